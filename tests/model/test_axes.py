"""Mixed rows where a layer's first axis may not be the batch: each row is as alone, or the layer is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import shake, transformer
from torch import Tensor, nn

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError, StateError


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, rows: int, length: int) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    tokens = ids(rows, length)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if name in ("t5", "bart") else {})}


def two(model: Any, targets: Any) -> Any:
    lorica.adapt(model, LoraConfig(r=2, target_modules=targets), "one")
    lorica.adapt(model, LoraConfig(r=3, target_modules=targets), "two")
    shake(model)
    return model.eval()


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def check(model: Any, given: dict[str, Tensor], names: list[str | None]) -> str | None:
    """Compare a mixed call with each row alone; returns what was said where it is refused."""
    alone = []
    for i, name in enumerate(names):
        with lorica.active(model, name or ()):
            alone.append(first(model(**{key: value[i : i + 1] for key, value in given.items()})))
    try:
        with lorica.mixed(model, names):
            together = first(model(**given))
            again = first(model(**given))
    except (AdapterError, StateError) as error:
        return str(error)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, together)
    assert not torch.allclose(alone[0], alone[1])
    return None


NAMES: dict[int, list[str | None]] = {2: ["one", "two"], 4: ["one", None, "two", "one"]}
LINEAR = r".*\.(query|value|q|v|wi|wo|q_proj|v_proj|fc1|fc2|dense|c_attn|c_fc|query_key_value|q_lin|lin1)"
TABLES = {
    "bert": "embeddings.position_embeddings",
    "gpt2": "transformer.wpe",
    "t5": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
}


@pytest.mark.parametrize("length", [2, 4, 6])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize(
    "name", ["bert-classifier", "gpt2", "t5", "llama", "bloom", "bart", "vit", "opt", "distilbert", "mixtral"]
)
def test_linear_layers_of_whole_models(name: str, rows: int, length: int) -> None:
    assert check(two(transformer(name), LINEAR), inputs(name, rows, length), NAMES[rows]) is None


@pytest.mark.parametrize("length", [2, 4, 6])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_positions_are_refused_by_name(name: str, rows: int, length: int) -> None:
    model = two(
        transformer(name), [TABLES[name], "q" if name == "t5" else "query" if name == "bert" else "c_attn"]
    )
    said = check(model, inputs(name, rows, length), NAMES[rows])
    assert said is not None
    assert said.startswith(f"{TABLES[name]}: the first axis of its input")
    # One adapter for all rows needs no axis.
    with lorica.mixed(model, ["one"] * rows), torch.no_grad():
        together = first(model(**inputs(name, rows, length)))
    with lorica.active(model, "one"), torch.no_grad():
        torch.testing.assert_close(together, first(model(**inputs(name, rows, length))))


class BatchSecond(nn.Module):
    """Tokens first, rows second, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).transpose(0, 1)
        return self.head(torch.tanh(self.up(x)).mean(0))


class Queries(nn.Module):
    """As many learned queries as there may be rows, and patches of all rows packed together."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.queries, self.packed = nn.Parameter(torch.randn(4, 8)), packed
        self.embed, self.up, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.packed:  # the tokens above 20 only, as experts and packed images see them
            some = input_ids > 20
            return x.masked_scatter(some.unsqueeze(-1), self.up(x[some])) @ torch.ones(8, 3)
        scores = x @ self.up(self.queries).T
        return self.head(scores.softmax(-1) @ self.queries)


@pytest.mark.parametrize("length", [2, 4, 6])
@pytest.mark.parametrize(
    ("model", "path"), [(BatchSecond(), "up"), (Queries(packed=False), "up"), (Queries(packed=True), "up")]
)
def test_other_first_axes_are_refused_by_name(model: nn.Module, path: str, length: int) -> None:
    model = two(copy.deepcopy(model), ["up"])
    said = check(model, {"input_ids": ids(4, length)}, NAMES[4])
    assert said is not None
    assert said.startswith(f"{path}: ")


def test_packed_tokens_that_happen_to_fit_are_refused() -> None:
    model = two(Queries(packed=True), ["up"])
    tokens = torch.tensor([[25, 3, 30, 4], [5, 6, 7, 26], [27, 28, 29, 8], [9, 31, 10, 32]])
    said = check(model, {"input_ids": tokens}, NAMES[4])
    assert said is not None
    assert said.startswith("up: the first axis of its input (8, 8) is not the batch")


@torch.no_grad()
def test_showing_one_row_leaves_no_trace() -> None:
    model: Any = two(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), ["0"]
    )
    model.train()
    x = torch.randn(4, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    with lorica.mixed(model, NAMES[4]):
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        first_time = model(x)
        assert int(model[1].num_batches_tracked) == 0
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    torch.manual_seed(0)
    with lorica.mixed(model, NAMES[4]):
        assert torch.equal(model(x), first_time)
    assert all(module.training for module in model.modules())


def test_names_shorter_than_the_batch_are_beams_or_refused() -> None:
    model = two(transformer("gpt2"), ["c_attn"])
    with lorica.mixed(model, ["one", "two"]):
        with pytest.raises(AdapterError, match=r"2 adapters were named.*the model sees 4 rows"):
            model(ids(4, 4))
        with pytest.raises(AdapterError, match=r"2 adapters were named.*the model sees 4 rows"):
            model.generate(ids(4, 4), max_new_tokens=1, pad_token_id=0)
        beams = model.generate(ids(2, 4), num_beams=2, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(AdapterError, match="sees 4 rows"):
            model(ids(4, 4))
    assert len(beams) == 2


@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(name: str, beams: int) -> None:
    model = two(transformer(name), ["q", "v"] if name == "t5" else ["q_proj", "v_proj"])
    prompt, options = (
        ids(4, 4),
        {"max_new_tokens": 4, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None},
    )
    alone = []
    for row, who in zip(prompt, NAMES[4], strict=True):
        with lorica.active(model, who or ()):
            alone.append(model.generate(row[None], **options))
    with lorica.mixed(model, NAMES[4]):
        assert torch.equal(model.generate(prompt, **options), torch.cat(alone))


def test_experts_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    model = two(Routed(), ["experts.0"])
    with pytest.raises(StateError, match=r"experts\.0 is an expert, which sees some of the tokens"):
        lorica.mixed(model, ["one", "two"])
