"""The model card beside an adapter's weights; names in it are text, whatever characters they hold."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from lorica.adapter import Adapter
from lorica.config import LoraConfig

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&])")
_PLAIN_YAML = re.compile(r"(?:base_model:adapter:)?[A-Za-z][\w.]*[-/][\w./-]*", re.ASCII)
_MODEL = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_MARK = "<!-- written by lorica; remove this line to keep your own edits when the adapter is saved again -->"
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def model_card(adapter: Adapter, existing: Path, about: str = "") -> str | None:
    """The text of a new card, or None where somebody has written one that must stay.

    Args:
        adapter: what the card is of.
        existing: the card that is there, if one is.
        about: sections in Markdown on what the adapter does and how it was trained.
    """
    try:
        edited = _MARK not in existing.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        edited = False
    except OSError:
        edited = True  # an unreadable card is somebody else's
    if edited:
        return None
    config = adapter.config
    base, pipeline = config.base_model_name_or_path, _PIPELINES.get(config.task_type or "")
    # The Hub takes `base_model` for the name of a repository, so a local path is left out.
    # So is the name of a script's own model, which PEFT's files give by its class.
    library = (getattr(config, "auto_mapping", None) or {}).get("parent_library") or "transformers"
    known = str(library).startswith(("transformers", "diffusers"))
    on_hub = base is not None and known and is_model_name(base)
    lora, others = config.members()
    head = [
        "---",
        *([f"base_model: {as_yaml(base)}"] if base and on_hub else []),
        # The Hub knows the library of the format by this name, and shows how to load it.
        f"library_name: {'lorica' if others else 'peft'}",
        *([f"pipeline_tag: {pipeline}"] if pipeline else []),
        "tags:",
        *(["- lora"] if lora else []),
        "- lorica",
        "- adapter",
        *([f"- {as_yaml(f'base_model:adapter:{base}')}", "- transformers"] if on_hub else []),
        "---",
        "",
        _MARK,
        "",
    ]
    whole = config.modules_to_save
    methods = " and ".join(["LoRA"] * bool(lora) + [other.method for other in others])
    body = [
        f"# {'A LoRA adapter' if methods == 'LoRA' else f'What {methods} trained'} "
        f"for {as_markdown(base or 'a pretrained model')}",
        "",
        "| | |",
        "|---|---|",
        *(_of_lora(adapter, lora) if lora else []),
        f"| parameters | {adapter.numel:,} |",
        *(
            [f"| trained whole | {as_markdown(', '.join(whole))} |"]
            if (whole := config.modules_to_save)
            else []
        ),
        "",
        *([about.strip(), ""] if about.strip() else []),
        "## Use",
        "",
        "```python",
        "import lorica",
        "",
        'lorica.load(model, "path/to/this/folder")  # model: the base, already loaded',
        "```",
        "",
        *(["The files are lorica's own: PEFT does not have this method.", ""] if others else _WITH_PEFT),
        *(_with_vllm(adapter, base) if lora and not others else []),
    ]
    return "\n".join([*head, *body])


_WITH_PEFT = [
    "The files are in PEFT's format:",
    "",
    "```python",
    "from peft import PeftModel",
    "",
    'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
    "```",
    "",
]


def _with_vllm(adapter: Adapter, base: str | None) -> list[str]:
    """Lines on serving the adapter with vLLM; empty unless it has plain linear layers alone."""
    plain = all(
        f.kind == "linear" and f.magnitude is None and f.bias is None for f in adapter.factors.values()
    )
    if adapter.config.task_type != "CAUSAL_LM" or adapter.extras or adapter.added or not plain:
        return []
    # vLLM's `--max-lora-rank` takes these values alone.
    rank = max(factors.r for factors in adapter.factors.values())
    room = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= size), None)
    if room is None:
        return []
    return [
        "vLLM serves it beside others:",
        "",
        "```sh",
        f"vllm serve {as_shell(as_line(base or 'BASE'))} --enable-lora --max-lora-rank {room} --lora-modules "
        "mine=path/to/this/folder",
        "```",
        "",
    ]


def _of_lora(adapter: Adapter, config: LoraConfig) -> list[str]:
    rooted = ", scaled by the square root of the rank" if config.use_rslora else ""
    ranks = sorted({factors.r for factors in adapter.factors.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [
        f"| rank | {rank} |",
        f"| alpha | {config.lora_alpha:g}{rooted} |",
        f"| adapted modules | {len(adapter.factors)} |",
    ]


def as_line(text: str) -> str:
    """A text on one line: line breaks and control characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def as_markdown(text: str) -> str:
    """A text that Markdown shows as it is: no markup, HTML, table cell or heading of its own."""
    escaped = _SPECIAL.sub(r"\\\1", as_line(text))
    # Renderers know these without the backslash.
    return escaped.replace("\\&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\_", "_")


def as_yaml(text: str) -> str:
    """A text as a YAML scalar, quoted where YAML could read anything else."""
    return text if _PLAIN_YAML.fullmatch(text) else json.dumps(text)


def as_shell(text: str) -> str:
    """A text as one word of a shell's line."""
    return shlex.quote(text)


def is_model_name(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub rather than a path."""
    return _MODEL.fullmatch(text) is not None
