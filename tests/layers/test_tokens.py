"""`trainable_token_indices`: against a table with those rows put into it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, record, transformer
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
import lorica.algebra
from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.layers import TrainedTokens
from lorica.model.merging.merged import finalize

ROWS = [7, 2, 39]


class Model(nn.Module):
    """A language model whose head is tied to its embedding, with a bias."""

    def __init__(self, tied: bool = True, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=padding)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def config(rows: Any = ROWS, **more: Any) -> lorica.LoraConfig:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["body"], "trainable_token_indices": rows}
    return lorica.LoraConfig(**fields | more)


def rows_of(model: Any, name: str = "default", at: str = "embed") -> nn.Parameter:
    return model.get_submodule(at).token_adapter.trainable_tokens_delta[name]


def make(*names: str, rows: Any = ROWS, tied: bool = True, **more: Any) -> tuple[Any, Any, Tensor]:
    """A model whose adapters have other rows than its own, the model before that, and ids."""
    before: Any = Model(tied, **more)
    model = copy.deepcopy(before)
    for i, name in enumerate(names):
        lorica.adapt(model, config(rows), name, seed=i)
        at = "embed" if isinstance(rows, list) else next(iter(rows))
        with torch.no_grad():
            rows_of(model, name, at).normal_(generator=torch.Generator().manual_seed(i))
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, :3] = torch.tensor(ROWS)
    return model, before, ids


def reference(base: Any, ids: Tensor, rows: Tensor, in_head: bool = True) -> Tensor:
    """The model with the rows in its table; differentiable."""
    table = base.embed.weight.detach().index_copy(0, torch.tensor(ROWS), rows)
    x = F.embedding(ids, table, base.embed.padding_idx)
    head = table if in_head else base.head.weight
    return F.linear(torch.tanh(base.body(x)), head, base.head.bias)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 2])
def test_outputs_and_gradients(tied: bool, padding: int | None) -> None:
    model, before, ids = make("default", tied=tied, padding=padding)
    rows = rows_of(model)
    assert rows.shape == (3, 6)
    expected = reference(before, ids, rows, tied)
    y = model(ids)
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(result.square().sum(), rows)[0] for result in (y, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with lorica.disabled(model):
        assert torch.equal(model(ids), before(ids))


def test_some_columns_of_a_batch_are_looked_up_without_a_warning() -> None:
    model = lorica.adapt(Model(), config())
    ids = torch.tensor([[1, 7], [2, 3], [39, 0]])
    torch.testing.assert_close(model(ids[:, 1]), model(ids)[:, 1])


def test_at_the_start_nothing_changes_and_only_the_rows_are_counted() -> None:
    model, before, ids = make()
    lorica.adapt(model, config())
    torch.testing.assert_close(model(ids), before(ids))
    assert torch.equal(rows_of(model), before.embed.weight[ROWS])
    assert isinstance(model.head, TrainedTokens)
    assert rows_of(model, at="head") is rows_of(model)
    assert lorica.trainable_parameters(model).trainable == 3 * 6 + 2 * (6 + 6)


def test_who_reads_the_weight_sees_the_rows() -> None:
    model, before, _ = make("default")
    expected = before.embed.weight.index_copy(0, torch.tensor(ROWS), rows_of(model))
    assert torch.equal(model.embed.weight, expected)
    assert torch.equal(model.head.weight, expected)
    with lorica.disabled(model):
        assert torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.embed._parameters["weight"], before.embed.weight)


def test_trained_the_rows_move_and_nothing_else_does() -> None:
    model, before, ids = make("default")
    start = rows_of(model).detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).logsumexp(-1).sum().backward()
        optimizer.step()
    assert not torch.equal(rows_of(model), start)
    for name in ("embed", "body", "head"):
        assert torch.equal(model.get_submodule(name)._parameters["weight"], before.get_submodule(name).weight)


def test_gradients_are_scaled_by_frequency_as_the_whole_tables_are() -> None:
    model, before, ids = make("default", tied=False)
    model.embed.scale_grad_by_freq = True
    rows = rows_of(model)
    looked_up = model.embed(ids)
    table = before.embed.weight.detach().index_copy(0, torch.tensor(ROWS), rows.detach()).requires_grad_()
    expected = F.embedding(ids, table, scale_grad_by_freq=True)
    torch.testing.assert_close(looked_up, expected)
    for each in (looked_up, expected):
        each.square().sum().backward()
    torch.testing.assert_close(rows.grad, table.grad[ROWS])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_switched_and_restored(tied: bool, dtype: torch.dtype) -> None:
    before = Model(tied).to(dtype)
    model: Any = copy.deepcopy(before)
    for i, name in enumerate(["one", "two"]):
        lorica.adapt(model, config(), name)
        with torch.no_grad():
            rows_of(model, name).normal_(generator=torch.Generator().manual_seed(i))
    ids = torch.tensor([ROWS])
    lorica.active(model, "one")
    was = record(model)
    with torch.no_grad():
        answers = {}
        for name in ("one", "two"):
            with lorica.active(model, name):
                answers[name] = model(ids)
        table = model.embed.weight
        lorica.merge(model, "one")
        assert type(model.embed) is nn.Embedding
        assert (model.head.weight is model.embed.weight) == tied
        assert torch.equal(model.embed.weight, table)
        torch.testing.assert_close(model(ids), answers["one"])
        lorica.switch(model, "two")
        torch.testing.assert_close(model(ids), answers["two"])
        assert (model.head.weight is model.embed.weight) == tied
        lorica.restore(model)
        assert torch.equal(model(ids), answers["one"])
    assert record(model) == was


def test_switched_to_an_adapter_without_rows_the_table_is_the_bases() -> None:
    model, before, ids = make("one")
    lorica.adapt(model, config(None), "plain")
    lorica.merge(model, "one")
    lorica.switch(model, "plain")
    assert model.embed.weight.data_ptr() != before.embed.weight.data_ptr()
    assert torch.equal(model.embed.weight, before.embed.weight)
    torch.testing.assert_close(model(ids), before(ids))
    lorica.restore(model)


def test_merged_for_good() -> None:
    model, before, ids = make("one")
    with torch.no_grad():
        y = model(ids)
    lorica.merge(model)
    finalize(model)
    torch.testing.assert_close(model(ids), y)
    assert list(model.state_dict()) == list(before.state_dict())
    assert model.embed.weight.requires_grad


def test_detached_the_model_is_as_it_was() -> None:
    base = Model()
    before = record(base)
    lorica.adapt(base, config(), "one")
    lorica.adapt(base, config({"embed": [1]}), "two")
    lorica.detach(base, "one")
    assert isinstance(base.embed, TrainedTokens)
    lorica.detach(base)
    assert record(base) == before


def test_files_there_and_back(tmp_path: Path) -> None:
    model, before, ids = make("default")
    lorica.save(model, tmp_path)
    adapter = lorica.read(tmp_path)
    assert list(adapter.extras) == ["embed.token_adapter.trainable_tokens_delta"]
    assert adapter.lora.trainable_token_indices == ROWS
    again = lorica.load(copy.deepcopy(before), tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        rows_of(again).zero_()
    lorica.load_weights(again, tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(again))(ids), model(ids))


def test_rows_of_the_batch_have_rows_of_their_own() -> None:
    model, before, ids = make("one", "two")
    lorica.adapt(model, config(None), "plain")
    with torch.no_grad(), lorica.mixed(model, ["two", None, "one"]):
        y = model(ids)
    for i, name in ((0, "two"), (2, "one")):
        torch.testing.assert_close(y[i], reference(before, ids, rows_of(model, name))[i])
    torch.testing.assert_close(y[1], before(ids)[1])
    with torch.no_grad(), lorica.mixed(model, ["plain"] * 3):
        torch.testing.assert_close(model(ids), before(ids))


def test_two_that_bring_rows_do_not_act_together() -> None:
    model, _, _ = make("one", "two")
    with pytest.raises(AdapterError, match=r"each brings its own (embed|head)"):
        lorica.active(model, ["one", "two"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 2])
def test_two_that_bring_other_rows_act_together(tied: bool, padding: int | None) -> None:
    model, before, ids = make("one", tied=tied, padding=padding)
    others = [1, 30]
    lorica.adapt(model, config(others), "two", seed=1)
    with torch.no_grad():
        rows_of(model, "two").normal_()
    ids[:, 3:5] = torch.tensor(others)
    lorica.active(model, ["one", "two"])
    both = torch.cat([rows_of(model, "one"), rows_of(model, "two")])
    table = before.embed.weight.detach().index_copy(0, torch.tensor([*ROWS, *others]), both)
    x = torch.tanh(before.body(F.embedding(ids, table, padding)))
    expected = F.linear(x, table if tied else before.head.weight, before.head.bias)
    y = model(ids)
    torch.testing.assert_close(y, expected)
    for name in ("one", "two"):
        rows = rows_of(model, name).requires_grad_(True)
        pair = (torch.autograd.grad(out.square().sum(), rows, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    lorica.merge(model, ["one", "two"])
    torch.testing.assert_close(model(ids), y)
    assert (model.head.weight is model.embed.weight) == tied
    lorica.restore(model)
    assert torch.equal(model.embed.base_weight, before.embed.weight)
    with torch.no_grad(), lorica.mixed(model, ["one", None, "two"]):
        y = model(ids)
    for i, name in ((0, "one"), (2, "two")):
        with lorica.active(model, name):
            torch.testing.assert_close(y[i], model(ids)[i])


def test_rows_and_a_whole_table_do_not_act_together() -> None:
    model, _, _ = make("rows", tied=False)
    lorica.adapt(model, lorica.FullConfig(), "full")
    with pytest.raises(AdapterError, match="cannot act together"):
        lorica.active(model, ["rows", "full"])


def test_an_untied_head_has_rows_of_its_own() -> None:
    model, before, ids = make("default", rows={"head": ROWS}, tied=False)
    assert type(model.embed) is nn.Embedding
    table = before.head.weight.detach().index_copy(0, torch.tensor(ROWS), rows_of(model, at="head"))
    x = torch.tanh(before.body(before.embed(ids)))
    torch.testing.assert_close(model(ids), F.linear(x, table, before.head.bias))


def test_tied_tables_with_other_tokens_each() -> None:
    model, _, _ = make()
    lorica.adapt(model, config({"embed": [1], "head": [1]}))
    assert rows_of(model, at="head") is rows_of(model)
    lorica.detach(model)
    lorica.adapt(model, config({"embed": [1], "head": [2, 3]}))
    assert rows_of(model, at="head").shape == (2, 6)
    with torch.no_grad():
        rows_of(model).add_(1)
    report = lorica.merge(model)
    assert report.untied == ["embed", "head"]
    lorica.restore(model)
    assert model.head.base_weight is model.embed.base_weight


def test_scaled_embeddings() -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    table = gemma.GemmaTextScaledWordEmbedding(9, 4, 0, embed_scale=3.0)
    base = nn.ModuleDict({"embed": table, "body": nn.Linear(4, 4)})
    model = copy.deepcopy(base)
    lorica.adapt(model, config({"embed": [1, 5]}))
    ids = torch.tensor([1, 3, 5])
    torch.testing.assert_close(model["embed"](ids), base["embed"](ids))
    with torch.no_grad():
        rows_of(model).fill_(2.0)
    assert model["embed"](ids)[::2].eq(6).all()


def test_a_language_models_tied_head() -> None:
    model = transformer("gpt2")
    ids = torch.tensor([[3, 5, 3]])
    with torch.no_grad():
        before = model(ids).logits
        lorica.adapt(model, lorica.LoraConfig(trainable_token_indices=[3]))
        torch.testing.assert_close(model(ids).logits, before)
        rows_of(model, at="transformer.wte").normal_()
        changed = (model(ids).logits - before).abs().amax((0, 1))
    assert changed[3] > 0.01
    lorica.detach(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


class TestRefused:
    @pytest.mark.parametrize(
        "rows", [[], {}, [1.5], [-1], [True], "3", {"embed": []}, {"": [1]}, {"embed": 1}, 3]
    )
    def test_what_are_no_indices(self, rows: Any) -> None:
        with pytest.raises(ConfigError, match="trainable_token_indices"):
            config(rows)

    def test_a_token_twice(self) -> None:
        with pytest.raises(ConfigError, match="names 3 twice"):
            config([3, 1, 3])

    @pytest.mark.parametrize(
        ("rows", "more", "problem"),
        [
            ([40], {}, "embed has 40 rows, and trainable_token_indices names 40"),
            ({"embd": [1]}, {}, "names 'embd', which the model does not have; did you mean 'embed'"),
            ([1], {"target_modules": ["body", "embed"]}, "so it cannot be in target_modules"),
            ([1], {"target_modules": ["head"]}, "head: rows of it train .* cannot be in target_modules"),
            ([1], {"modules_to_save": ["head"]}, "so it cannot be in modules_to_save"),
            ({"conv": [1]}, {}, "conv is a Conv1d; trainable_token_indices takes embeddings"),
        ],
    )
    def test_by_name_and_the_model_is_untouched(self, rows: Any, more: dict[str, Any], problem: str) -> None:
        model: Any = Model()
        model.conv = nn.Conv1d(1, 1, 1)
        before = record(model)
        with pytest.raises(TargetError, match=problem):
            lorica.adapt(model, config(rows, **more))
        assert record(model) == before

    def test_what_another_adapter_has_made_of_the_table(self) -> None:
        model, _, _ = make("default")
        with pytest.raises(TargetError, match="embed: another adapter trains rows of it"):
            lorica.adapt(model, config(None, target_modules=["embed"]), "two")
        with pytest.raises(TargetError, match="head cannot be trained whole: another adapter trains rows"):
            lorica.adapt(model, config(None, modules_to_save=["head"]), "two")
        lorica.detach(model)
        lorica.adapt(model, config(None, target_modules=["embed"]), "two")
        with pytest.raises(TargetError, match="embed: another adapter has made it a LoraEmbedding"):
            lorica.adapt(model, config(), "one")

    def test_a_table_that_rescales_its_rows(self) -> None:
        model = Model()
        model.embed.max_norm = 1.0
        with pytest.raises(TargetError, match="embed rescales its rows"):
            lorica.adapt(model, config())

    def test_a_file_that_does_not_fit(self, tmp_path: Path) -> None:
        model, _, _ = make("default")
        lorica.save(model, tmp_path)
        small = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, 4), "body": nn.Linear(6, 6)})
        small.get_input_embeddings = lambda: small["embed"]  # type: ignore[assignment]
        with pytest.raises(AdapterError, match=r"shape of embed.token_adapter.*\(3, 6\).*\(3, 4\)"):
            lorica.load(small, tmp_path)

    def test_rows_that_are_not_finite(self) -> None:
        model, _, _ = make("one", "two")
        with torch.no_grad():
            rows_of(model, "two")[0] = float("nan")
        lorica.merge(model, "one")
        with pytest.raises(AdapterError, match="embed: the merged rows would hold NaN"):
            lorica.switch(model, "two")
        lorica.restore(model)
        before = record(model)
        with pytest.raises(AdapterError, match="embed: the merged rows would hold NaN"):
            lorica.merge(model, "two")
        assert record(model) == before

    def test_sums_of_adapters_with_other_tokens(self) -> None:
        model, _, _ = make("one")
        lorica.adapt(model, config([1]), "two")
        with pytest.raises(AdapterError, match="trainable_token_indices"):
            lorica.algebra.add(lorica.extract(model, "one"), lorica.extract(model, "two"))
