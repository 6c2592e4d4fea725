"""`ensure_weight_tying`: against one table that both the embedding and the head use."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, record, shake, transformer
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica import algebra, checkpoint
from lorica.adapter import Adapter, Factors
from lorica.checkpoint import stream
from lorica.errors import AdapterError, ConfigError, LoricaWarning, TargetError
from lorica.layers import TiedFactor
from lorica.model.files import overwrite


class Model(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, dtype=dtype)
        self.body = nn.Linear(6, 6, dtype=dtype)
        self.head = nn.Linear(6, VOCABULARY, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


IDS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


def config(*targets: str, **more: Any) -> lorica.LoraConfig:
    fields: dict[str, Any] = {"r": 2, "target_modules": list(targets), "ensure_weight_tying": True}
    return lorica.LoraConfig(**fields | more)


def build(*targets: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    model = lorica.adapt(Model(dtype=dtype), config(*targets, **more), seed=0)
    shake(model)
    return model


def factors(model: Any, name: str = "default") -> tuple[Tensor, Tensor]:
    return model.embed.lora_embedding_A[name], model.embed.lora_embedding_B[name]


def reference(model: Any, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The model with the update in its one table; differentiable."""
    table = model.embed.base_weight.detach() + model.embed.scaling["default"] * (B @ A).t()
    body = model.body.base_weight if hasattr(model.body, "base_weight") else model.body.weight
    x = F.linear(F.embedding(ids, table), body, model.body.bias)
    return F.linear(torch.tanh(x), table, model.head.bias)


@pytest.mark.parametrize("targets", [("embed",), ("head",), ("head", "embed")])
def test_both_tables_get_one_update(targets: tuple[str, ...]) -> None:
    model = build(*targets)
    A, B = factors(model)
    expected = reference(model, IDS, A, B)
    y = model(IDS)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(result.square().sum(), (A, B)) for result in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["embed.lora_embedding_A.default", "embed.lora_embedding_B.default"]
    assert lorica.trainable_parameters(model).trainable == 2 * (VOCABULARY + 6)
    assert isinstance(model.head.lora_A["default"], TiedFactor)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_it_starts_as_a_head_does(init: bool | str) -> None:
    model: Any = Model()
    plain: Any = Model(tied=False)
    before = model(IDS)
    lorica.adapt(model, config("embed", init_lora_weights=init), seed=3)
    lorica.adapt(plain, lorica.LoraConfig(r=2, target_modules=["head"], init_lora_weights=init), seed=3)
    A, B = factors(model)
    assert not A.any()
    assert torch.equal(B.t(), plain.head.lora_A["default"].weight)
    assert torch.equal(model(IDS), before)


def test_trained_and_merged_the_tables_are_one_again() -> None:
    model = build("embed", "body")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).logsumexp(-1).sum().backward()
        optimizer.step()
    A, B = factors(model)
    y, before = model(IDS), record(model)
    W = model.embed.base_weight + model.embed.scaling["default"] * (B @ A).t()
    assert lorica.merge(model).untied == []
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.head.weight, W.detach())
    torch.testing.assert_close(model(IDS), y)
    lorica.restore(model)
    assert record(model) == before
    lorica.detach(model)
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight


def test_merged_adapters_take_turns_tied_and_untied() -> None:
    model = build("embed")
    for name, targets, tied in (("apart", ["embed", "head"], False), ("other", ["head"], True)):
        lorica.adapt(model, config(*targets, ensure_weight_tying=tied), name, seed=1)
        shake(model, 1)
    expected = {}
    for name in ("default", "apart", "other"):
        lorica.active(model, name)
        expected[name] = model(IDS)
    lorica.merge(model, "default")
    for name in ("apart", "other", "default", "apart", "apart", "default"):
        lorica.switch(model, name)
        torch.testing.assert_close(model(IDS), expected[name])
        assert (model.head.weight is model.embed.weight) == (name != "apart")
    lorica.restore(model)
    lorica.active(model, "apart")
    assert torch.equal(model(IDS), expected["apart"])


def test_a_merged_transformer_stays_tied_on_disk(tmp_path: Path) -> None:
    model = lorica.adapt(transformer("gpt2"), config("lm_head", "c_attn"))
    shake(model)
    ids = IDS[:, :5]
    expected = model(ids).logits
    lorica.save(model, tmp_path / "adapter")
    lorica.merge(model)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "merged")
    again = type(transformer("gpt2")).from_pretrained(tmp_path / "merged")
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again(ids).logits, expected)

    transformer("gpt2").save_pretrained(tmp_path / "base")
    stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed")
    streamed = type(again).from_pretrained(tmp_path / "streamed")
    assert json.loads((tmp_path / "streamed" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(streamed.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("whole", [("embed",), ("head",), ("head", "embed")])
def test_one_copy_is_trained_of_both(whole: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = lorica.adapt(Model(), config("body", modules_to_save=list(whole)))
    shake(model)
    copies = [module.modules_to_save["default"].weight for module in (model.embed, model.head)]
    assert copies[0] is copies[1]
    y = model(IDS)
    lorica.save(model, tmp_path)
    torch.manual_seed(0)
    again: Any = lorica.load(Model(), tmp_path, trainable=True)
    assert torch.equal(again(IDS), y)
    assert again.embed.modules_to_save["default"].weight is again.head.modules_to_save["default"].weight
    assert lorica.merge(model).untied == []
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y)


def test_a_copy_a_pickle_and_a_file_are_tied_too(tmp_path: Path) -> None:
    model = build("embed", "body", dtype=torch.float64)
    y = model(IDS)
    lorica.save(model, tmp_path)
    torch.manual_seed(0)
    loaded = lorica.load(Model(dtype=torch.float64), tmp_path, trainable=True)
    again: Any
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(again(IDS), y)
        assert again.head.lora_A["default"].transposed is factors(again)[1]
        shake(again)
        torch.testing.assert_close(again(IDS), reference_of_both(again))
    assert torch.equal(model(IDS), y)


def reference_of_both(model: Any) -> Tensor:
    """As `reference`, with the body's update."""
    body = copy.deepcopy(model)
    A, B = body.body.lora_A["default"].weight, body.body.lora_B["default"].weight
    body.body.base_weight.data += body.body.scaling["default"] * (B @ A).detach()
    return reference(body, IDS, *factors(body))


def test_values_from_elsewhere_are_taken_for_both() -> None:
    model = build("embed")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    found = lorica.extract(model, state_dict=state).factors
    torch.testing.assert_close(found["embed"].A, factors(model)[0] + 1)
    assert found["head"].shares(found["embed"])


def test_weights_of_a_checkpoint_are_put_back(tmp_path: Path) -> None:
    model = build("embed")
    y = model(IDS)
    lorica.save(model, tmp_path)
    shake(model, 5)
    lorica.load_weights(model, tmp_path)
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("r", [1, 2, 6, VOCABULARY])
@pytest.mark.parametrize("moves", ["", "double", "double float", "bfloat16 float"])
def test_its_own_file_is_taken_at_any_rank_and_after_any_move(r: int, moves: str, tmp_path: Path) -> None:
    model = build("embed", "head", r=r)
    for move in moves.split():
        model = getattr(model, move)()
    lorica.save(model, tmp_path)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    shake(model)
    lorica.load_weights(model, tmp_path)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in saved.items())
    if r not in (1, VOCABULARY):
        return
    torn = lorica.extract(model)
    first = torn.factors["head"]
    torn = dataclasses.replace(
        torn, factors={**torn.factors, "head": dataclasses.replace(first, B=2 * first.B)}
    )
    with pytest.raises(AdapterError, match="are one on the model, and differ in the adapter"):
        overwrite(model, torn)


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    model = build("embed")
    lorica.adapt(model, config("head", "body"), "other", seed=1)
    shake(model, 1)
    expected = []
    for name in ("default", "other"):
        lorica.active(model, name)
        expected.append(model(IDS))
    with lorica.disabled(model):
        expected.append(model(IDS))
    with torch.no_grad(), lorica.mixed(model, ["default", "other", None]):
        y = model(IDS)
    torch.testing.assert_close(y, torch.stack([result[i] for i, result in enumerate(expected)]))


def test_beside_a_bfloat16_base_one_update_trains_in_float32() -> None:
    model: Any = lorica.adapt(Model(dtype=torch.bfloat16), config("embed"))
    shake(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lorica.merge(model)
    assert model.head.weight is model.embed.weight


def differing(**more: Any) -> Adapter:
    """An adapter that says it is tied, with a head of its own; as PEFT's beside a 16-bit base."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"embed": ((2, VOCABULARY), (6, 2)), "head": ((2, 6), (VOCABULARY, 2))}
    made = {
        path: Factors(
            torch.randn(A, generator=draw),
            torch.randn(B, generator=draw),
            4.0,
            "embedding" if path == "embed" else "linear",
        )
        for path, (A, B) in shapes.items()
    }
    return Adapter(config("embed", "head", **more), made)


def test_factors_that_differ_are_two_updates_and_said_to_be() -> None:
    adapter = differing()
    with pytest.warns(LoricaWarning, match=r"other factors for head than for embed"):
        model: Any = lorica.attach(Model(), adapter)
    head, table = adapter.factors["head"], adapter.factors["embed"]
    own, shared = (model.head.base_weight + 4 * d for d in (head.B @ head.A, (table.B @ table.A).t()))
    x = torch.tanh(model.body(F.embedding(IDS, shared)))
    torch.testing.assert_close(model(IDS), F.linear(x, own, model.head.bias))
    assert lorica.merge(model).untied == ["embed", "head"]


def test_a_model_that_is_tied_refuses_values_that_are_not() -> None:
    model = build("embed")
    y = model(IDS)
    folder_adapter = differing()
    with pytest.raises(AdapterError, match=r"head \(A\) and embed \(B\) are one on the model"):
        overwrite(model, folder_adapter)
    assert torch.equal(model(IDS), y)


def test_copies_that_differ_are_refused() -> None:
    model = lorica.adapt(Model(), config("body", modules_to_save=["embed"]))
    adapter = lorica.extract(model)
    extras = {**adapter.extras, "head.weight": adapter.extras["head.weight"] + 1}
    with pytest.raises(AdapterError, match=r"head\.weight is not equal to embed\.weight"):
        lorica.attach(Model(), Adapter(adapter.config, adapter.factors, extras))


class TestAlgebra:
    """What is made from tied adapters is tied."""

    @pytest.fixture
    def adapters(self) -> list[Adapter]:
        model = build("embed", "body")
        lorica.adapt(model, config("head", "body"), "other", seed=1)
        shake(model, 1)
        return [lorica.extract(model, name) for name in ("default", "other")]

    def test_every_combination(self, adapters: list[Adapter]) -> None:
        made = [
            algebra.add(*adapters),
            algebra.subtract(*adapters),
            algebra.scale(adapters[0], -2),
            algebra.compress(adapters[0], rank=1)[0],
            algebra.combine(adapters, [1, 2], "linear"),
            algebra.combine(adapters, [1, 2], "dare_ties", density=0.5, seed=0),
        ]
        for adapter in made:
            head, table = adapter.factors["head"], adapter.factors["embed"]
            assert head.shares(table)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                lorica.attach(Model(), adapter)
        a, b = (f.scale * f.B @ f.A for f in (each.factors["embed"] for each in adapters))
        total = made[0].factors["embed"]
        torch.testing.assert_close(total.B @ total.A, a + b)

    def test_a_tied_and_an_untied_one_make_an_untied_one(self, adapters: list[Adapter]) -> None:
        model = lorica.adapt(Model(), config("embed", "head", ensure_weight_tying=False))
        shake(model)
        total = algebra.add(adapters[0], lorica.extract(model))
        assert not total.lora.ensure_weight_tying
        lorica.attach(Model(), total)


REFUSED = [
    (config("embed", use_dora=True), "share one table, and DoRA gives a head one magnitude"),
    (config("embed", rank_pattern={"head": 3}), "rank_pattern gives head 3 and embed 2"),
    (config("embed", alpha_pattern={"embed": 3}), "alpha_pattern gives head 8 and embed 3"),
    (config("embed", "body", exclude_modules=["head"]), "exclude_modules leaves out head"),
    (config("head", init_lora_weights="pissa"), "is for linear layers, and this is a Embedding"),
    (
        config("body", trainable_token_indices={"embed": [1], "head": [2]}),
        "names other tokens of head than of embed",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_tied_is_refused(given: lorica.LoraConfig, message: str) -> None:
    class Named(Model):
        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    model = Named()
    before = record(model)
    with pytest.raises(TargetError, match=message):
        lorica.adapt(model, given)
    assert record(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [(Model(), "of the tied embed, head none is adapted"), (Model(tied=False), "none of this Model is tied")],
    ids=["left alone", "untied"],
)
def test_nothing_to_tie_is_said(model: Model, message: str) -> None:
    with pytest.warns(LoricaWarning, match=message):
        lorica.adapt(model, config("body"))


def test_the_field_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="ensure_weight_tying must be True or False"):
        config("embed", ensure_weight_tying="yes")


def test_a_table_that_is_only_held_is_left_out(tmp_path: Path) -> None:
    model = transformer("t5")
    lorica.adapt(model, config("lm_head", "encoder.embed_tokens"))
    shake(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"encoder.embed_tokens.lora_embedding_{side}.default" for side in "AB"}
    assert (
        model.decoder.embed_tokens.lora_embedding_A["default"]
        is (model.encoder.embed_tokens.lora_embedding_A["default"])
    )
    lorica.save(model, tmp_path)
    assert set(checkpoint.read(tmp_path).factors) == {
        "encoder.embed_tokens",
        "decoder.embed_tokens",
        "lm_head",
    }
    again = lorica.load(transformer("t5"), tmp_path)
    inputs = {"input_ids": IDS[:, :6], "decoder_input_ids": IDS[:, :3]}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
