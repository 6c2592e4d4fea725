"""Scripts as users of PEFT write them: each takes the library, `peft` or `lorica.peft`, and gives results."""

from __future__ import annotations

import importlib
import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import batch, transformer
from torch import Tensor, nn
from transformers import GenerationConfig

Script = Callable[[Any, Path], dict[str, Any]]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give everything that trains values that follow from its name, so that both libraries have the same."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seed = zlib.crc32(name.replace(".base_layer", "").encode())
            draw = torch.Generator().manual_seed(seed)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def build(p: Any, name: str, **settings: Any) -> Any:
    """A tiny model with a filled adapter."""
    model = p.get_peft_model(transformer(name), p.LoraConfig(**{"r": 3, "lora_alpha": 5} | settings))
    fill(model)
    return model.eval()


@torch.no_grad()
def logits(model: Any, name: str, **more: Any) -> Tensor:
    result = model(**batch(name), **more)
    return next(result[key] for key in ("logits", "start_logits", "last_hidden_state") if key in result)


def trains(model: nn.Module) -> dict[str, bool]:
    """What trains of the adapters, by name."""
    return {
        n: q.requires_grad for n, q in model.named_parameters() if "lora_" in n or "modules_to_save." in n
    }


CLASSIFIER: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def counting(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    model = build(p, "bert-classifier", **CLASSIFIER)
    model.print_trainable_parameters()
    return {
        "count": model.get_nb_trainable_parameters(),
        "class": type(model).__name__,
        "base": type(model.get_base_model()).__name__,
        "same": model.base_model.model is model.get_base_model(),
        "trains": sorted(n for n, q in model.named_parameters() if q.requires_grad),
        "state": dict(p.get_peft_model_state_dict(model)),
        "logits": logits(model, "bert-classifier"),
        "forwarded": model.config.hidden_size,
        "task": model.peft_config["default"].task_type == p.TaskType.SEQ_CLS,
        "type": model.peft_type == p.PeftType.LORA,
    }


def saving(p: Any, folder: Path) -> dict[str, Any]:
    model = build(p, "bert-classifier", bias="lora_only", **CLASSIFIER)
    model.add_adapter("other", p.LoraConfig(r=2, target_modules=["value"]))
    model.save_pretrained(folder)
    model.save_pretrained(folder / "one", selected_adapters=["other"])
    model.save_pretrained(folder / "pickle", safe_serialization=False, selected_adapters=["default"])
    again = p.PeftModel.from_pretrained(transformer("bert-classifier"), folder)
    pickled = p.PeftModel.from_pretrained(
        transformer("bert-classifier"), folder / "pickle", is_trainable=True
    )
    config = p.PeftConfig.from_pretrained(folder)
    files = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".md" and path.is_file()
    }
    return {
        "files": sorted(files),
        "tensors": safetensors.torch.load_file(folder / "adapter_model.safetensors"),
        "class": type(again).__name__,
        "logits": logits(again, "bert-classifier"),
        "pickled": logits(pickled.eval(), "bert-classifier"),
        "training": (again.training, trains(again), trains(pickled)),
        "config": (type(config).__name__, config.r, config.lora_alpha, config.bias, config.inference_mode),
        "json": {
            key: value
            for key, value in json.loads((folder / "adapter_config.json").read_text()).items()
            if key in ("r", "lora_alpha", "bias", "task_type", "peft_type", "inference_mode", "auto_mapping")
        },
        "other": safetensors.torch.load_file(folder / "one" / "other" / "adapter_model.safetensors").keys(),
    }


def saving_whole(p: Any, folder: Path) -> dict[str, Any]:
    results = {}
    for names in (
        ["norm"],
        ["head"],
        ["tion_layernorm", "lp.up_proj", "1.input_layernorm"],
        ["norm", "lm_head"],
    ):
        model = build(p, "llama", **CAUSAL, modules_to_save=names)
        model.add_adapter("other", p.LoraConfig(**CAUSAL, modules_to_save=names))
        place = folder / "_".join(names)
        model.save_pretrained(place)
        again = p.PeftModel.from_pretrained(transformer("llama"), place, is_trainable=True)
        bare = p.inject_adapter_in_model(p.LoraConfig(**CAUSAL, modules_to_save=names), transformer("llama"))
        model.load_adapter(place, "default")
        results["_".join(names)] = {
            "trains": [trains(model), trains(again), trains(bare)],
            "logits": [logits(model, "llama"), logits(again.eval(), "llama")],
            "tensors": safetensors.torch.load_file(place / "adapter_model.safetensors"),
        }
    return results


def choosing(p: Any, folder: Path) -> dict[str, Any]:
    name = "bert"
    model = build(p, name, target_modules=["query", "value"])
    results: dict[str, Any] = {}

    def note(step: str) -> None:
        results[step] = (model.active_adapters, trains(model), logits(model, name))

    note("first")
    model.add_adapter("other", p.LoraConfig(r=2, target_modules=["value", "dense"]))
    note("added")
    model.set_adapter("other")
    fill(model)
    note("chosen")
    model.base_model.set_adapter(["default", "other"])
    note("both")
    model.set_adapter("default", inference_mode=True)
    note("frozen")
    model.set_requires_grad(["default", "other"])
    note("thawed")
    model.save_pretrained(folder)
    model.load_adapter(folder / "other", "third")
    note("loaded")
    model.load_adapter(folder / "other", "fourth", is_trainable=True)
    note("loaded to train")
    model.delete_adapter("fourth")
    results["deleted"] = (model.active_adapters, sorted(model.peft_config))
    return results


def disabling(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    name = "llama"
    model = build(p, name, **CAUSAL)
    inside = []
    with model.disable_adapter():
        inside.append(logits(model, name))
        with model.disable_adapter():
            inside.append(logits(model, name))
        inside.append(logits(model, name))
        inside.append(logits(model, name, adapter_names=["default", "__base__", "default"]))
    results: dict[str, Any] = {"inside": inside, "after": logits(model, name)}
    model.base_model.disable_adapter_layers()
    results["off"] = (logits(model, name), model.active_adapters)
    model.base_model.enable_adapter_layers()
    return {**results, "on": logits(model, name)}


def merging(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    name = "llama"
    model = build(p, name, **CAUSAL)
    model.add_adapter("other", p.LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("other")
    fill(model)
    results: dict[str, Any] = {"before": logits(model, name)}
    model.merge_adapter()
    results["merged"] = logits(model, name)
    model.merge_adapter(["default"])
    results["both"] = logits(model, name)
    results["state"] = dict(p.get_peft_model_state_dict(model, adapter_name="other"))
    model.unmerge_adapter()
    results["unmerged"] = logits(model, name)
    base = model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    results["unloaded"] = (type(base).__name__, sorted(base.state_dict()), logits(base, name))
    base = build(p, name, **CAUSAL).unload()
    results["bare"] = (type(base).__name__, sorted(base.state_dict()), logits(base, name))
    return results


def rows(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    results: dict[str, Any] = {}
    for name, targets in {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}.items():
        model = build(
            p, name, target_modules=targets, task_type="CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"
        )
        model.add_adapter("other", p.LoraConfig(r=2, target_modules=targets))
        model.set_adapter("other")
        fill(model)
        names = ["other", "__base__", "default"]
        results[name] = logits(model, name, adapter_names=names)
        inputs = {"input_ids": batch(name)["input_ids"], "max_new_tokens": 4, "min_new_tokens": 4}
        results[f"{name} generates"] = model.generate(**inputs, adapter_names=names)
        results[f"{name} searches"] = model.generate(**inputs, adapter_names=names, num_beams=2)
        results[f"{name} alone"] = model.generate(**inputs)
    return results


def generating(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    model = build(p, "llama", **CAUSAL)
    before = model.generation_config.max_new_tokens
    ids = batch("llama")["input_ids"][:, :2]
    model.generation_config = GenerationConfig(
        max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return {
        "before": before,
        "tokens": model.generate(input_ids=ids),
        "more": model.generate(input_ids=ids, generation_config=model.generation_config, max_new_tokens=4),
        "after": model.get_base_model().generation_config.max_new_tokens,
        "none": hasattr(build(p, "bert", target_modules=["query"]), "generation_config"),
    }


def inspecting(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    model = build(p, "bert-classifier", **CLASSIFIER)
    model.add_adapter("other", p.LoraConfig(r=2, target_modules=["query"]))
    results: dict[str, Any] = {
        "layers": list(map(vars, model.get_layer_status())),
        "model": vars(model.get_model_status()),
    }
    model.merge_adapter()
    merged = vars(model.get_model_status())
    results["merged"] = merged["active_adapters"], merged["num_adapter_layers"]
    model.unmerge_adapter()
    with model.disable_adapter():
        results["disabled"] = model.get_model_status().enabled
    bare = p.inject_adapter_in_model(p.LoraConfig(target_modules=["query"]), transformer("bert"))
    results["bare"] = (
        [status.name for status in p.get_layer_status(bare)],
        sorted(p.get_peft_model_state_dict(bare)),
    )
    return results


def loading(p: Any, folder: Path) -> dict[str, Any]:
    name = "bert-classifier"
    model = build(p, name, **CLASSIFIER)
    model.save_pretrained(folder)
    weights = p.load_peft_weights(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    result = p.set_peft_model_state_dict(model, weights | {"base_model.model.nothing.weight": torch.ones(1)})
    other = p.get_peft_model(transformer(name), p.LoraConfig(r=3, lora_alpha=5, **CLASSIFIER))
    other.load_adapter(folder, "default")
    keys = {
        key.removeprefix("base_model.model."): weight for key, weight in weights.items() if "lora_" in key
    }
    injected = p.inject_adapter_in_model(
        p.LoraConfig(r=3, target_modules=["query"]), transformer(name), state_dict=keys
    )
    return {
        "unexpected": len(result.unexpected_keys),
        "set": logits(model, name),
        "overwritten": logits(other.eval(), name),
        "keys": sorted(weights),
        "injected": sorted(n for n, _ in injected.named_parameters() if "lora_" in n),
    }


def training(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    name = "bert-classifier"
    # In double precision: AdamW's first steps make much of how a machine rounds a gradient near zero.
    model = build(p, name, **CLASSIFIER).double()
    optimizer = importlib.import_module(f"{p.__name__}.optimizers").create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    losses = []
    for _ in range(3):
        loss = model(**batch(name), labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    return {"losses": losses, "groups": groups, "state": dict(p.get_peft_model_state_dict(model))}


def automatic(p: Any, folder: Path) -> dict[str, Any]:
    transformer("bert-classifier").save_pretrained(folder / "base")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = p.get_peft_model(base, p.LoraConfig(**CLASSIFIER))
    fill(model)
    model.save_pretrained(folder / "adapter")
    again = p.AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", adapter_name="mine")
    plain = p.get_peft_model(
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base"),
        p.LoraConfig(target_modules=["query"]),
    )
    fill(plain)
    plain.save_pretrained(folder / "plain")
    unnamed = p.AutoPeftModel.from_pretrained(folder / "plain")
    return {
        "again": (type(again).__name__, again.active_adapters, logits(again, "bert-classifier")),
        "mapping": json.loads((folder / "plain" / "adapter_config.json").read_text())["auto_mapping"],
        "unnamed": (type(unnamed).__name__, type(unnamed.get_base_model()).__name__),
        "plain": logits(unnamed, "bert-classifier"),
        "named": again.peft_config["mine"].base_model_name_or_path == str(folder / "base"),
    }


def scaling(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    name = "bert-classifier"
    model = build(p, name, **CLASSIFIER)
    with importlib.import_module(f"{p.__name__}.helpers").rescale_adapter_scale(model, 0.5):
        half = logits(model, name)
    return {"half": half, "whole": logits(model, name)}


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"svd_rank": 2},
    {"combination_type": "linear"},
    {"combination_type": "cat"},
    {"combination_type": "ties", "density": 0.5},
    {"combination_type": "ties", "density": 0.7, "majority_sign_method": "frequency"},
    {"combination_type": "ties_svd", "density": 0.5},
    {"combination_type": "magnitude_prune", "density": 0.5},
    {"combination_type": "magnitude_prune_svd", "density": 0.5, "svd_rank": 4},
    # At a density of 1 DARE drops nothing, and nothing is left to chance.
    {"combination_type": "dare_linear", "density": 1.0},
    {"combination_type": "dare_ties", "density": 1.0},
    {"combination_type": "dare_linear_svd", "density": 1.0},
    {"combination_type": "dare_ties_svd", "density": 1.0},
]


def combining(p: Any, folder: Path) -> dict[str, Any]:
    del folder
    name = "llama"
    model = build(p, name, **CAUSAL)
    model.add_adapter("other", p.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    fill(model)
    results: dict[str, Any] = {}
    for i, options in enumerate(COMBINATIONS):
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], f"c{i}", **options)
        results[f"{options} left alone"] = model.active_adapters, trains(model)
        config = model.peft_config[f"c{i}"]
        results[f"{options} config"] = config.r, config.lora_alpha
        model.set_adapter(f"c{i}", inference_mode=True)
        results[str(options)] = logits(model, name)
        model.set_adapter("other")
    model.add_weighted_adapter(["default"], [2.0], "alone")
    model.set_adapter("alone")
    return {**results, "alone": logits(model, name)}


def casting(p: Any, folder: Path) -> dict[str, Any]:
    results = {}
    kinds: list[dict[str, Any]] = [{}, {"use_dora": True}, {"lora_bias": True}]
    for cast, settings in itertools.product((True, False), kinds):
        place = folder / "_".join([str(cast), *settings])
        config = p.LoraConfig(**CAUSAL, **settings)
        model = p.get_peft_model(
            transformer("llama", dtype=torch.bfloat16), config, autocast_adapter_dtype=cast
        )
        model.save_pretrained(place)
        again = p.PeftModel.from_pretrained(
            transformer("llama", dtype=torch.bfloat16), place, autocast_adapter_dtype=cast
        )
        results[place.name] = [
            {str(q.dtype) for n, q in m.named_parameters() if "lora_" in n} for m in (model, again)
        ]
        results[f"{place.name} runs"] = logits(model, "llama").dtype
    return results


SCRIPTS: list[Script] = [
    counting,
    saving,
    saving_whole,
    choosing,
    disabling,
    merging,
    rows,
    generating,
    inspecting,
    loading,
    training,
    automatic,
    scaling,
    combining,
    casting,
]
