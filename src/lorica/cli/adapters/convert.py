"""``lorica convert``: between loralib's checkpoints and PEFT's adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorica.cli.shared import hints
from lorica.cli.shared.parsing import Parser, add_output, output_of
from lorica.errors import ConfigError

if TYPE_CHECKING:
    from lorica.adapter import Adapter

T = TypeVar("T")

_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "convert",
        description="Turn a checkpoint of loralib's into an adapter folder in PEFT's format, or back. Exact: "
        "the tensors keep their values and their dtype.",
    )
    add = result.add_argument
    add(
        "source",
        type=str,
        help="checkpoint of loralib's (a file, or a folder with one), or an adapter folder",
    )
    add_output(result, "folder to write; or, towards loralib, a file such as adapter.bin", required=True)
    add("--to", type=str, default=None, help="peft or loralib (default: whichever the source is not)")
    text = "lora_alpha that the loralib layers were made with; it is not in their file"
    add("--alpha", type=float, default=None, help=text)
    text = (
        "a MergedLinear and which of its projections have an update, where the model has one weight for all"
    )
    add("--enable_lora", action="append", metavar="NAME=true,false,true", help=text)
    text = "a MergedLinear and the model's own module for each projection, - for one without an update"
    add("--split", action="append", metavar="NAME=Q,-,V", help=text)
    add("--embedding", action="append", metavar="NAME", help="a layer of loralib's that is an embedding")
    add("--base_model", type=str, default=None, help="the base that the adapter belongs to")
    add("--task_type", type=str, default=None, help="SEQ_CLS, CAUSAL_LM, ... (default: none)")
    text = "name of adapted modules in the new configuration (default: by the names in the file)"
    add("--target_modules", action="append", metavar="NAME", help=text)
    text = "module that was trained whole (default: by the names in the file)"
    add("--modules_to_save", action="append", metavar="NAME", help=text)
    return result


def run(argv: list[str]) -> int:
    """Convert, and print the result."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    out = output_of(command, parsed)

    from lorica import checkpoint
    from lorica.checkpoint.loralib import read as read_loralib
    from lorica.checkpoint.loralib import write as write_loralib

    is_peft = checkpoint.is_adapter(parsed.source)
    target = parsed.to or ("loralib" if is_peft else "peft")
    if target not in ("peft", "loralib"):
        raise ConfigError(f"--to must be peft or loralib, not {target!r}")
    if target == ("peft" if is_peft else "loralib"):
        raise ConfigError(f"{parsed.source} is {target}'s already; leave out --to, or copy it")
    enable_lora = _table("--enable_lora", parsed.enable_lora, _flag)
    split = _table("--split", parsed.split, lambda part: None if part == "-" else part)
    if is_peft:
        adapter = checkpoint.read(parsed.source)
        write_loralib(adapter, out, enable_lora=enable_lora, split=split)
        print(f"wrote {_contents(adapter)} to {out}")
        if adapter.classes:
            print(f"the file does not hold the names of the classes: {', '.join(adapter.classes)}")
        print(f"the file does not hold the scale; make the layers with {_settings(adapter, enable_lora)}")
        return 0
    settings = {
        "base_model_name_or_path": parsed.base_model,
        "task_type": parsed.task_type,
        "target_modules": parsed.target_modules,
        "modules_to_save": parsed.modules_to_save,
    }
    adapter = read_loralib(
        parsed.source,
        parsed.alpha,
        enable_lora=enable_lora,
        split=split,
        embeddings=parsed.embedding or (),
        **{name: value for name, value in settings.items() if value},
    )
    checkpoint.write(adapter, Path(out))
    config = adapter.lora
    print(f"wrote {_contents(adapter)} to {out}")
    print(f"r={config.r}, lora_alpha={config.lora_alpha:g}, target_modules={config.target_modules}")
    if config.modules_to_save:
        print(f"trained whole: {', '.join(config.modules_to_save)}")
    hints.show(hints.command("info", out), hints.command("study", out))
    return 0


def _contents(adapter: Adapter) -> str:
    updates, whole = len(adapter.factors), len(adapter.extras)
    return f"{updates} update{'s' * (updates != 1)} and {whole} tensor{'s' * (whole != 1)} trained whole"


def _settings(adapter: Adapter, enable_lora: Mapping[str, Sequence[bool]]) -> str:
    """The arguments of loralib's layers, with the number of those that take them where they differ."""
    from lorica.checkpoint.fused import ends_with

    counts: Counter[str] = Counter()
    for path, factors in adapter.factors.items():
        enabled = next((parts for name, parts in enable_lora.items() if ends_with(path, name)), [True])
        r = factors.r // sum(enabled)
        counts[f"r={r}, lora_alpha={factors.scale * r:g}"] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{arguments} ({count} updates)" for arguments, count in counts.items())


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ConfigError(f"--enable_lora takes true or false for each projection, not {text!r}")
    return _FLAGS[text.lower()]


def _table(option: str, given: list[str] | None, part: Callable[[str], T]) -> dict[str, list[T]]:
    """``NAME=a,b,c`` as name → parts."""
    result = {}
    for item in given or ():
        name, equals, parts = item.partition("=")
        if not (name and equals and parts):
            raise ConfigError(f"{option} takes NAME=a,b,c with a part for each projection, not {item!r}")
        result[name] = [part(one.strip()) for one in parts.split(",")]
    return result
