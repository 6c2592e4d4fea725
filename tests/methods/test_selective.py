"""Full and partial fine-tuning, and BitFit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.common import ARCHITECTURES, check_round_trip, trained_names
from tiny import Toy, outputs, record, shake, transformer

import lorica
from lorica.config import AdapterConfig
from lorica.errors import AdapterError, ConfigError, FileError, TargetError
from lorica.methods import Combination

FT, TOP1, BITFIT = lorica.FullConfig(), lorica.TopConfig(blocks=1), lorica.BitFitConfig()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("config", [FT, TOP1], ids=["full", "top"])
def test_partial(name: str, config: AdapterConfig, tmp_path: Path) -> None:
    check_round_trip(name, config, tmp_path)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("llama", "t5")])
def test_bitfit(name: str, tmp_path: Path) -> None:
    check_round_trip(name, BITFIT, tmp_path)
    check_round_trip(name, [lorica.LoraConfig(r=2, target_modules="all-linear"), BITFIT], tmp_path / "both")


def test_what_trains() -> None:
    for name in ARCHITECTURES:
        model = transformer(name)
        everything = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        assert trained_names(lorica.adapt(model, FT)) == everything
    gpt2 = transformer("gpt2")
    assert trained_names(lorica.adapt(gpt2, TOP1)) == {
        n for n, _ in gpt2.named_parameters() if n.startswith("transformer.h.1.")
    }
    t5 = lorica.adapt(transformer("t5"), TOP1)  # the last blocks are the decoder's
    assert all(n.startswith("decoder.block.1.") for n in trained_names(t5))
    bert = lorica.adapt(transformer("bert"), BITFIT)
    assert trained_names(bert) == {n for n, _ in bert.named_parameters() if n.endswith("bias")}


def test_the_head_is_trained_whole_beside_them() -> None:
    model = lorica.adapt(transformer("bert-classifier"), lorica.BitFitConfig(task_type="SEQ_CLS"))
    heads = {n for n in trained_names(model) if "classifier" in n}
    assert heads == {"classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"}
    assert lorica.adapters(model)["default"].modules_to_save == ["classifier"]


def test_tied_parameters_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    model = lorica.adapt(transformer("gpt2"), FT)
    assert model.lm_head.weight is model.transformer.wte.weight
    shake(model)
    lorica.save(model, tmp_path)
    value = lorica.read(tmp_path)
    assert [n for n in value.extras if n in ("lm_head.weight", "transformer.wte.weight")] == [
        "transformer.wte.weight"
    ]
    other = lorica.load(transformer("gpt2"), tmp_path)
    assert other.lm_head.weight is other.transformer.wte.weight


@pytest.mark.parametrize("config", [FT, TOP1, BITFIT, [lorica.LoraConfig(r=2), BITFIT]])
def test_merging_is_exact(config: AdapterConfig) -> None:
    model: Any = lorica.adapt(transformer("bert-classifier"), config)
    shake(model)
    adapted, before = outputs(model), record(model)
    lorica.merge(model)
    assert torch.allclose(outputs(model), adapted, atol=1e-6)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert record(lorica.restore(model)) == before
    with pytest.raises(AdapterError, match="cannot differ by row"):
        lorica.mixed(model, ["default", None])


def test_several_stand_side_by_side() -> None:
    model = transformer("bert-classifier")
    base = outputs(model)
    lorica.adapt(model, BITFIT, "biases")
    shake(model)
    biases = outputs(model)
    lorica.adapt(model, FT, "all")
    shake(model, 1)
    everything = outputs(model)
    for name, expected in (("biases", biases), ("all", everything), ((), base)):
        lorica.active(model, name)
        assert torch.equal(outputs(model), expected)
    with pytest.raises(AdapterError, match="cannot act together"):
        lorica.active(model, ["biases", "all"])


def test_the_file_names_the_method(tmp_path: Path) -> None:
    lora = lorica.LoraConfig(r=2)
    model = lorica.adapt(transformer("bert"), [lora, BITFIT])
    lorica.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["method"] == "combination"
    assert "peft_type" not in written
    assert [part.get("method", "lora") for part in written["configs"]] == ["lora", "bitfit"]
    with pytest.raises(AdapterError, match="combination"):
        lorica.algebra.scale(lorica.read(tmp_path), 2.0)
    assert "bitfit" in (tmp_path / "README.md").read_text()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"method": "bitfitt"}))
    with pytest.raises(ConfigError, match="did you mean 'bitfit'"):
        lorica.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"method": "top", "block": 1}))
    with pytest.raises(ConfigError, match="'block'; did you mean 'blocks'"):
        lorica.read(tmp_path)


def test_a_file_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    model = lorica.adapt(transformer("bert"), BITFIT)
    value = lorica.extract(model)
    key = next(iter(value.extras))
    short = lorica.Adapter(value.config, {}, {n: t for n, t in value.extras.items() if n != key})
    other = transformer("bert")
    before = record(other)
    with pytest.raises(AdapterError, match=f"missing: {key}"):
        lorica.attach(other, short)
    with pytest.raises(AdapterError, match="unexpected: prefix"):
        lorica.attach(other, lorica.Adapter(value.config, {}, value.extras, {"prefix": torch.ones(1)}))
    assert record(other) == before
    with pytest.raises(FileError):
        lorica.load(other, tmp_path / "none")


def test_what_an_architecture_cannot_take() -> None:
    for name in ("llama", "t5"):
        model = transformer(name)
        before = record(model)
        with pytest.raises(TargetError, match=r"no biases"):
            lorica.adapt(model, BITFIT)
        assert record(model) == before
    with pytest.raises(TargetError, match="has 2; give fewer"):
        lorica.adapt(transformer("bert"), lorica.TopConfig(blocks=3))
    with pytest.raises(TargetError, match="no list of transformer blocks"):
        lorica.adapt(Toy(), TOP1)


def test_two_methods_that_own_one_parameter() -> None:
    for pair in ([FT, BITFIT], [lorica.LoraConfig(), FT], [lorica.LoraConfig(bias="all"), BITFIT]):
        model = transformer("bert")
        before = record(model)
        with pytest.raises(TargetError, match="own the same parameter"):
            lorica.adapt(model, pair)
        assert record(model) == before
    with pytest.raises(ConfigError, match="lora is given twice"):
        lorica.adapt(transformer("bert"), [lorica.LoraConfig(), lorica.LoraConfig(r=2)])


def test_configurations_are_checked() -> None:
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(ConfigError, match="blocks must be a whole number"):
            lorica.TopConfig(blocks=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="task_type"):
        lorica.BitFitConfig(task_type="SEQ")
    with pytest.raises(ConfigError, match="modules_to_save"):
        lorica.FullConfig(modules_to_save="head")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one"):
        lorica.adapt(transformer("bert"), [])
    with pytest.raises(ConfigError, match="must agree on task_type"):
        lorica.adapt(
            transformer("bert"),
            [lorica.LoraConfig(task_type="SEQ_CLS"), lorica.BitFitConfig(task_type="CAUSAL_LM")],
        )


def test_their_classes() -> None:
    assert {c.family for c in (FT, TOP1, BITFIT)} == {"selective"}


def test_heads_of_a_combination_without_lora(tmp_path: Path) -> None:
    config = [lorica.BitFitConfig(task_type="SEQ_CLS"), lorica.PreEmbedConfig(prefix=2)]
    model: Any = lorica.adapt(transformer("bert-classifier"), config, seed=1)
    shake(model)
    expected = outputs(model)
    assert [path for path, rows in model.lorica_state.whole("default").items() if rows is None] == [
        "classifier"
    ]
    lorica.save(model, tmp_path)
    again: Any = lorica.load(transformer("bert-classifier"), tmp_path)
    assert "classifier" in again.lorica_state.whole("default")
    assert torch.equal(outputs(again), expected)


def test_heads_that_a_combination_names_itself() -> None:
    methods = (lorica.BitFitConfig(), lorica.PreEmbedConfig(prefix=2))
    config = Combination(configs=methods, modules_to_save=["classifier"])
    model: Any = lorica.adapt(transformer("bert-classifier"), config)
    assert "classifier" in model.lorica_state.whole("default")
