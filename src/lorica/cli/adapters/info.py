"""``lorica info``: what is in an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cli.shared.parsing import Parser
from lorica.plain import as_json

if TYPE_CHECKING:
    from lorica.config import AdapterConfig


def parser() -> Parser:
    """The command's options."""
    result = Parser("info", description="Show what is in an adapter, lorica's or PEFT's. No model is loaded.")
    result.add_argument(
        "directory", type=str, help="folder with adapter_config.json and adapter_model.safetensors"
    )
    result.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return result


def describe(directory: str) -> dict[str, Any]:
    """An adapter's settings, counts and norms, as plain values; without torch where its files are plain."""
    from lorica.cli.adapters.glance import glance
    from lorica.config import family_of

    config, found = glance(Path(directory)) or whole_read(directory)
    lora, others = config.members()
    own = () if lora is None else ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
    return {
        "methods": ["lora"] * (lora is not None) + [other.method for other in others],
        "class": family_of(config),
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type,
        **{name: getattr(lora, name) for name in own},
        "modules_to_save": config.modules_to_save,
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "layers": found["layers"],
        "whole": found["whole"],
        "added": found.get("added", {}),
    }


def whole_read(directory: str) -> tuple[AdapterConfig, dict[str, Any]]:
    """The table of `glance`, for any adapter."""
    from lorica.checkpoint import read

    adapter = read(directory)
    return adapter.config, {
        "parameters": adapter.numel,
        "bytes": adapter.nbytes,
        "layers": {
            path: {
                "r": factors.r,
                "scale": factors.scale,
                "shape": [factors.B.shape[0], *factors.A.shape[1:]],
                "norm": factors.norm(),
            }
            for path, factors in adapter.factors.items()
        },
        "whole": {name: list(tensor.shape) for name, tensor in adapter.extras.items()},
        "added": {name: list(tensor.shape) for name, tensor in adapter.added.items()},
    }


def run(argv: list[str]) -> int:
    """Show it."""
    parsed: Any = parser().parse_args(argv)
    found = describe(parsed.directory)
    if parsed.json:
        print(as_json(found))
        return 0

    from lorica.train.console import make_console, print_table, size

    console = make_console()
    summary = [
        ["method", f"{', '.join(found['methods'])} ({found['class']})"],
        ["base model", found["base_model"] or "not recorded"],
        ["task", found["task_type"] or "not recorded"],
    ]
    if "lora" in found["methods"]:
        targets = found["target_modules"]
        summary += [
            ["rank", str(found["r"])],
            ["alpha", f"{found['lora_alpha']:g}{' / sqrt(r)' if found['use_rslora'] else ''}"],
            ["dropout", f"{found['lora_dropout']:g}"],
            ["targets", ", ".join(targets) if isinstance(targets, list) else str(targets)],
        ]
    summary += [
        ["parameters", f"{found['parameters']:,}"],
        ["size", size(found["bytes"])],
    ]
    for name, value in summary:
        console.print(f"{name:<11} {value}", soft_wrap=True)
    layers = [
        [
            path,
            str(layer["r"]),
            " x ".join(map(str, layer["shape"])),
            f"{layer['scale']:g}",
            f"{layer['norm']:.4g}",
        ]
        for path, layer in found["layers"].items()
    ]
    if layers:
        print_table(
            console,
            "updates, and their Frobenius norm ‖s·B·A‖",
            ["layer", "rank", "shape", "scale", "norm"],
            layers,
        )
    for key, title in (("whole", "trained whole"), ("added", "added to the model")):
        if found[key]:
            rows = [[name, " x ".join(map(str, shape))] for name, shape in found[key].items()]
            print_table(console, title, ["tensor", "shape"], rows)
    return 0
