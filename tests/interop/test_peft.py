"""PEFT and lorica read each other's files, and then compute the same."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import VOCABULARY, batch, outputs, shake, tokens, transformer
from torch import Tensor, nn

import lorica
import lorica.peft

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

# PEFT warns of its own future and of tied weights; neither is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")


class Zoo(nn.Module):
    """One of each kind of layer that both can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.conv1 = nn.Conv1d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1, stride=(1, 1, 2))
        self.linear = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.conv2(x[:, None]).mean(1)
        x = x + self.conv3(x[:, None, :, :, None].expand(-1, -1, -1, -1, 2)).mean((1, 4))
        x = x + self.linear(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base, with the same weights each time."""
    if name != "zoo":
        return transformer(name, dtype=dtype)
    torch.manual_seed(0)
    return Zoo().to(dtype).eval()


EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss", "llama4")
"""Their grouped products are not there in double precision."""


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """What a model computes; of one in float32 in double precision, whichever way a machine rounds."""
    if next(model.parameters()).dtype == torch.float32 and name not in EXPERTS:
        model.double()
    if name == "zoo":
        return model(tokens())
    result = model(**batch(name))
    return next(result[key] for key in ("logits", "start_logits", "last_hidden_state") if key in result)


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1, float(other.abs().max())))


HEAD = {"task_type": "SEQ_CLS"}
# Base and settings. Every layer type, every field, every task.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("zoo", {"target_modules": ["linear"]}),
    ("zoo", {"target_modules": ["linear"], "r": 1, "lora_alpha": 1}),
    ("zoo", {"target_modules": ["linear"], "r": 7, "lora_alpha": 3}),
    ("zoo", {"target_modules": ["table"]}),
    ("zoo", {"target_modules": ["conv1"]}),
    ("zoo", {"target_modules": ["conv2"]}),
    ("zoo", {"target_modules": ["conv3"]}),
    ("zoo", {"target_modules": ["linear", "table", "conv1", "conv2", "conv3"], "use_rslora": True}),
    ("zoo", {"target_modules": ["linear", "table", "conv1", "conv2", "conv3"], "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    (
        "zoo",
        {"target_modules": r"conv\d|linear", "rank_pattern": {"conv2": 5}, "alpha_pattern": {r"conv\d": 9}},
    ),
    ("zoo", {"target_modules": ["linear", "conv1", "table"], "bias": "lora_only"}),
    ("zoo", {"target_modules": ["linear", "conv1"], "bias": "all"}),
    ("zoo", {"target_modules": ["linear", "conv1"], "bias": "all", "modules_to_save": ["head", "conv2"]}),
    ("zoo", {"target_modules": ["linear", "conv1", "conv2", "conv3"], "lora_bias": True}),
    ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "lora_only", "fan_in_fan_out": True}),
    (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]},
    ),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}),
    ("qwen3-moe", {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
    (
        "gpt-oss",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.down_proj_bias", "experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    ("llama4", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    ("bert", {"target_modules": ["query", "dense"], "layer_replication": [[0, 1], [0, 2]]}),
    ("zoo", {"target_modules": ["linear"], "trainable_token_indices": {"table": [3, 1]}}),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [0, 7]}),
    (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5], "embed_tokens": [2]}},
    ),
    ("t5", {"target_modules": ["q"], "trainable_token_indices": [4, 9, 2]}),
    ("bert-classifier", {"target_modules": ["query"], "trainable_token_indices": [4], **HEAD}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("gpt2", {"target_modules": None}),
    ("gpt2", {"target_modules": ["wte"]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "lm_head"], "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["lm_head", "wte"], "ensure_weight_tying": True, "use_rslora": True}),
    ("gpt2", {"target_modules": r".*c_attn|lm_head", "ensure_weight_tying": True, "lora_dropout": 0.1}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [3], "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"}),
    ("gpt2-classifier", {"target_modules": None, **HEAD}),
    ("bert", {"target_modules": None, "task_type": "FEATURE_EXTRACTION"}),
    ("bert", {"target_modules": ["query"], "exclude_modules": ["1.attention.self.query"]}),
    ("bert-classifier", {"target_modules": "all-linear", **HEAD}),
    (
        "bert-classifier",
        {"target_modules": ["query", "word_embeddings"], "init_lora_weights": "gaussian", **HEAD},
    ),
    ("bert-classifier", {"target_modules": ["key", "dense"], "layers_to_transform": [1], "bias": "all"}),
    ("bert-masked", {"target_modules": ["query", "decoder"]}),
    ("bert-masked", {"target_modules": ["query"], "bias": "all"}),
    ("bert-tokens", {"target_modules": None, "task_type": "TOKEN_CLS"}),
    ("bert-answers", {"target_modules": None, "task_type": "QUESTION_ANS"}),
    ("distilbert", {"target_modules": ["q_lin", "v_lin"], **HEAD}),
    ("roberta", {"target_modules": None, "bias": "lora_only", **HEAD}),
    ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama-classifier", {"target_modules": ["q_proj"], "layers_to_transform": [0], **HEAD}),
    ("t5", {"target_modules": None, "task_type": "SEQ_2_SEQ_LM"}),
    ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1], "layers_pattern": ["block"]}),
    ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    ("opt", {"target_modules": None}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    name, settings = case
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


@pytest.fixture(params=CASES, ids=named)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    name, settings = request.param
    # PEFT writes into the lists it is given.
    return name, copy.deepcopy({"r": 3, "lora_alpha": 5} | settings)


def by_peft(name: str, settings: dict[str, Any], folder: Path, **more: Any) -> Tensor:
    """Save an adapter with PEFT; returns what PEFT's model computes."""
    model = peft.get_peft_model(build(name, **more), peft.LoraConfig(**settings))
    shake(model, size=0.2)
    model.eval().save_pretrained(folder)
    return logits(model, name)


def by_lorica(name: str, settings: dict[str, Any], folder: Path, **more: Any) -> Tensor:
    """Save an adapter with lorica; returns what lorica's model computes."""
    model = lorica.adapt(build(name, **more), lorica.LoraConfig(**settings))
    shake(model, size=0.2)
    lorica.save(model, folder)
    return logits(model, name)


def test_pefts_files_load_here(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, settings = case
    expected = by_peft(name, settings, tmp_path)
    assert not torch.allclose(expected, logits(build(name), name), rtol=0, atol=1e-7)
    agree(logits(lorica.load(build(name), tmp_path), name), expected)


def test_files_from_here_load_in_peft(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, settings = case
    expected = by_lorica(name, settings, tmp_path)
    assert not torch.allclose(expected, logits(build(name), name), rtol=0, atol=1e-7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(build(name), tmp_path)
    agree(logits(model.eval(), name), expected)


def test_files_that_went_round_are_the_same(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, settings = case
    by_peft(name, settings, tmp_path / "theirs")
    first = lorica.read(tmp_path / "theirs")
    lorica.save(lorica.load(build(name), tmp_path / "theirs"), tmp_path / "ours")
    second = lorica.read(tmp_path / "ours")
    assert {path: (f.scale, f.kind) for path, f in first.factors.items()} == {
        path: (f.scale, f.kind) for path, f in second.factors.items()
    }
    before, after = first.named_tensors(), second.named_tensors()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    # PEFT writes an adapted embedding's own table too; that is the base's, and not written again.
    tables = ("wte.weight", "word_embeddings.weight", "lm_head.weight")
    assert all(key.endswith(tables) for key in before.keys() - after.keys())


@pytest.mark.parametrize("make", [lorica.LoraConfig.from_dict, lambda fields: lorica.LoraConfig(**fields)])
def test_every_field_of_pefts_is_taken_where_it_asks_for_nothing(make: Any) -> None:
    defaults = peft.LoraConfig().to_dict()
    assert make(defaults) == lorica.LoraConfig(lora_alpha=defaults["lora_alpha"])


@pytest.fixture(params=["none", "lora_only", "all"])
def attention(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 5, "target_modules": ["attention", "linear"], "bias": request.param}


def test_an_attention_that_peft_trained_acts_here_as_it_did_there(
    attention: dict[str, Any], tmp_path: Path
) -> None:
    expected = by_peft("zoo", attention, tmp_path)
    agree(logits(lorica.load(build("zoo"), tmp_path), "zoo"), expected)


def test_so_it_does_where_its_values_are_set(attention: dict[str, Any], tmp_path: Path) -> None:
    expected = by_peft("zoo", attention | {"bias": "none"}, tmp_path)
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({key: fields[key] for key in fields if key != "peft_version"}))  # as by 0.17
    model = lorica.peft.get_peft_model(
        build("zoo"), lorica.peft.LoraConfig(**attention).replace(bias="none")
    ).eval()
    found = lorica.peft.set_peft_model_state_dict(model, lorica.peft.load_peft_weights(tmp_path))
    assert found == ([], [])
    agree(logits(model, "zoo"), expected)


def test_an_attention_trained_here_counts_its_output_twice_in_peft(
    attention: dict[str, Any], tmp_path: Path
) -> None:
    model = lorica.adapt(build("zoo"), lorica.LoraConfig(**attention).replace(bias="none"))
    shake(model, size=0.2)
    lorica.save(model, tmp_path)
    once = logits(model, "zoo")
    in_peft = logits(peft.PeftModel.from_pretrained(build("zoo"), tmp_path).eval(), "zoo")
    lorica.extract(model).factors["attention.out_proj"].B.mul_(2)
    agree(logits(model, "zoo"), in_peft)
    # When this fails PEFT has mended it: then files of that version must not be doubled when they are read.
    assert not torch.allclose(once, in_peft, atol=1e-3)


def test_all_linear_of_a_model_with_an_attention_loads_in_peft(tmp_path: Path) -> None:
    model = lorica.adapt(build("zoo"), lorica.LoraConfig(r=3, target_modules="all-linear"))
    shake(model, size=0.2)
    lorica.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        in_peft = peft.PeftModel.from_pretrained(build("zoo"), tmp_path).eval()
    lorica.extract(model).factors["attention.out_proj"].B.mul_(2)
    agree(logits(model, "zoo"), logits(in_peft, "zoo"))


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_a_bfloat16_base(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 3, "target_modules": None}
    theirs = by_peft(name, settings, tmp_path / "theirs", dtype=torch.bfloat16)
    ours = by_lorica(name, settings, tmp_path / "ours", dtype=torch.bfloat16)
    here = logits(lorica.load(build(name, torch.bfloat16), tmp_path / "theirs"), name)
    model = peft.PeftModel.from_pretrained(build(name, torch.bfloat16), tmp_path / "ours").eval()
    # Both keep float32 factors; what each rounds to bfloat16 on the way differs.
    torch.testing.assert_close(here, theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logits(model, name), ours, rtol=2e-2, atol=2e-2)
    factors = lorica.read(tmp_path / "theirs").factors.values()
    assert {f.A.dtype for f in factors} == {torch.float32}


def test_several_adapters(tmp_path: Path) -> None:
    name = "bert-classifier"
    config: dict[str, Any] = {"r": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(build(name), peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**config | {"r": 5, "target_modules": ["value", "dense"]}))
    expected = {}
    for seed, adapter in enumerate(("default", "other")):
        model.set_adapter(adapter)
        shake(model, seed, 0.2)
        expected[adapter] = logits(model.eval(), name)
    model.save_pretrained(tmp_path / "theirs")
    folders = {"default": "", "other": "other"}

    ours = build(name)
    for adapter, folder in folders.items():
        lorica.load(ours, tmp_path / "theirs" / folder, adapter)
    for adapter, result in expected.items():
        lorica.active(ours, adapter)
        agree(logits(ours, name), result)

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    again.load_adapter(tmp_path / "ours" / "other", "other")
    for adapter, result in expected.items():
        again.set_adapter(adapter)
        agree(logits(again.eval(), name), result)


class TestTransformers:
    """transformers' own adapters, which PEFT stands behind."""

    CONFIG: ClassVar[dict[str, Any]] = {"r": 3, "target_modules": ["query", "dense"], "bias": "none"}

    @pytest.fixture
    def quiet(self) -> Iterator[None]:
        transformers = pytest.importorskip("transformers")
        before = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        yield
        transformers.utils.logging.set_verbosity(before)

    def test_files_of_add_adapter_load_here(self, tmp_path: Path) -> None:
        model = transformer("bert-classifier")
        model.add_adapter(peft.LoraConfig(**self.CONFIG))
        model.set_adapter("default")
        shake(model, size=0.2)
        model.eval().save_pretrained(tmp_path)
        expected = outputs(model)
        agree(outputs(lorica.load(transformer("bert-classifier"), tmp_path)), expected)

    @pytest.mark.usefixtures("quiet")
    def test_files_from_here_load_by_load_adapter(self, tmp_path: Path) -> None:
        expected = by_lorica("bert-classifier", self.CONFIG, tmp_path)
        model = transformer("bert-classifier")
        model.load_adapter(str(tmp_path))
        agree(logits(model.eval(), "bert-classifier"), expected)

    def test_saved_by_save_pretrained_here(self, tmp_path: Path) -> None:
        ours = lorica.adapt(transformer("bert-classifier"), lorica.LoraConfig(**self.CONFIG))
        shake(ours, size=0.2)
        ours.save_pretrained(tmp_path)
        model = transformer("bert-classifier")
        model.load_adapter(str(tmp_path))
        agree(outputs(model.eval()), outputs(ours))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_table_that_peft_did_not_tie_is_taken_alone(field: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["c_attn"], "ensure_weight_tying": True, field: ["wte"]}
    expected = by_peft("gpt2", settings, tmp_path)
    agree(logits(lorica.load(build("gpt2"), tmp_path), "gpt2"), expected)
