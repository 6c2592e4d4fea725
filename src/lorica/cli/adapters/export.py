"""``lorica export``: an adapter in the form that another program takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorica.cli.shared.parsing import Parser, add_output, output_of
from lorica.errors import AdapterError, ConfigError, lines, nearest

if TYPE_CHECKING:
    from lorica.adapter import Adapter

FORMATS = ("peft", "vllm", "sglang", "gguf", "mlx", "diffusers-kohya")


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "export",
        description="Write an adapter in the form that another program takes: with one rank and scale 1 in "
        "PEFT's files (peft, vllm, sglang), as llama.cpp's GGUF file, as mlx-lm's folder, or as the file "
        "of kohya's that diffusers loads. What the form cannot carry is refused by name.",
    )
    result.add_argument("adapter", type=str, help="folder with the adapter, lorica's or PEFT's")
    result.add_argument("--to", type=str, required=True, help=", ".join(FORMATS))
    result.add_argument(
        "--base",
        type=str | None,
        help="the base: its name as the server knows it; for gguf the folder or Hub name whose config.json "
        "is read (default: as the adapter recorded it)",
    )
    result.add_argument(
        "--rank",
        type=int | None,
        help="make DoRA plain LoRA of this rank, the nearest there is, and print how far off it is; the "
        "base's weights are read",
    )
    result.add_argument(
        "--part",
        type=str | None,
        help="diffusers-kohya: unet, te, te1 or te2 (default: by the names of layers)",
    )
    add_output(result, "folder to write, new or empty; for gguf and diffusers-kohya the file", required=True)
    return result


def run(argv: list[str]) -> int:
    """Export, and print the files written."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    if parsed.to not in FORMATS:
        raise ConfigError(
            f"--to must be one of {', '.join(FORMATS)}, not {parsed.to!r}{nearest(parsed.to, FORMATS)}"
        )
    out = output_of(command, parsed)

    from lorica.checkpoint import read

    adapter = read(parsed.adapter)
    base = parsed.base or adapter.config.base_model_name_or_path
    dora = any(f.magnitude is not None for f in adapter.factors.values())
    if parsed.rank is not None and not dora:
        raise ConfigError(
            f"--rank makes DoRA plain LoRA, and {parsed.adapter} has none; for less rank: lorica compress"
        )
    if parsed.rank is not None:
        adapter = _without_dora(adapter, base, parsed.rank)
    if parsed.to == "gguf":
        from lorica.export import write_gguf

        print(f"wrote {write_gguf(adapter, _config_of(base), out)}")
        return 0

    if parsed.to == "mlx":
        from lorica.cli.shared.made import check_new
        from lorica.export import write_mlx

        print(f"wrote {write_mlx(adapter, check_new(out))}")
        return 0

    if parsed.to == "diffusers-kohya":
        from lorica.export import part_of, write_kohya

        print(f"wrote {write_kohya({parsed.part or part_of(adapter): adapter}, out)}")
        return 0

    from lorica.checkpoint import write
    from lorica.cli.shared.made import check_new
    from lorica.export import SERVERS, check_serve, even

    folder = check_new(out)
    plain = even(adapter)
    config = plain.lora.replace(base_model_name_or_path=base)
    # Checked before anything is written: what even() does not change is in the source's files.
    if parsed.to in SERVERS:
        kept = [f for f in check_serve(parsed.adapter, parsed.to, max_rank=512) if f.refused]
        mended = ("use_rslora", "rank_pattern", "alpha_pattern", *(["use_dora"] if parsed.rank else []))
        if problems := [f"{f.what}: {f.effect}" for f in kept if f.what not in mended]:
            raise AdapterError(
                f"{parsed.to} cannot serve {parsed.adapter}:\n{lines(problems)}\n"
                f"See: lorica check-serve {parsed.adapter} --for {parsed.to}"
            )
    write(dataclasses.replace(plain, config=config), folder)
    print(f"wrote {folder}: rank {config.r} and scale 1 in every layer")
    return 0


def _without_dora(adapter: Adapter, base: str | None, rank: int) -> Adapter:
    """The nearest plain adapter of a rank; how far off it is, is printed."""
    from lorica.export import without_dora
    from lorica.model import attach
    from lorica.train.merge import load_base

    if base is None:
        raise ConfigError("the adapter does not record its base; name it with --base")
    model = attach(load_base(base, adapter, None), adapter)
    plain, report = without_dora(model, rank=rank)
    print(report)
    return plain


def _config_of(base: str | None) -> dict[str, Any]:
    """The fields of the base's configuration.

    Raises:
        ConfigError: it is not known which, or it cannot be read.
    """
    if base is None:
        raise ConfigError("the adapter does not record its base; name it with --base")

    from transformers import AutoConfig

    from lorica.checkpoint.embedded import resolve_model

    try:
        return AutoConfig.from_pretrained(resolve_model(base), trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration of {base} cannot be read: {error}") from error
