"""The model card beside an adapter's weights."""

from __future__ import annotations

from pathlib import Path

from lorica.adapter import Adapter
from lorica.config import LoraConfig, members

_MARK = "<!-- written by lorica; remove this line to keep your own edits when the adapter is saved again -->"
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def model_card(adapter: Adapter, existing: Path) -> str | None:
    """The text of a new card, or None where somebody has written one that must stay."""
    try:
        edited = _MARK not in existing.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        edited = False
    except OSError:
        edited = True  # what cannot be read is not ours to replace
    if edited:
        return None
    config = adapter.config
    base, pipeline = config.base_model_name_or_path, _PIPELINES.get(config.task_type or "")
    # A local path is of no use to the Hub, which takes `base_model` for the name of a repository.
    on_hub = base and not Path(base).is_absolute() and base.count("/") <= 1
    lora, others = members(config)
    head = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        "library_name: lorica",
        *([f"pipeline_tag: {pipeline}"] if pipeline else []),
        "tags:",
        *(["- lora"] if lora else []),
        "- adapter",
        "---",
        "",
        _MARK,
        "",
    ]
    methods = " and ".join(["LoRA"] * bool(lora) + [other.method for other in others])
    body = [
        f"# {'A LoRA adapter' if methods == 'LoRA' else f'What {methods} trained'} "
        f"for {base or 'a pretrained model'}",
        "",
        "| | |",
        "|---|---|",
        *(_of_lora(adapter, lora) if lora else []),
        f"| parameters | {adapter.numel:,} |",
        *([f"| trained whole | {', '.join(config.modules_to_save)} |"] if config.modules_to_save else []),
        "",
        "```python",
        "import lorica",
        "",
        'lorica.load(model, "path/to/this/folder")  # model: the base, already loaded',
        "```",
        "",
        *(
            ["The files are lorica's own: PEFT does not have this method."]
            if others
            else ["The files are in PEFT's format; `PeftModel.from_pretrained` reads them too."]
        ),
        "",
    ]
    return "\n".join([*head, *body])


def _of_lora(adapter: Adapter, config: LoraConfig) -> list[str]:
    rooted = ", scaled by the square root of the rank" if config.use_rslora else ""
    ranks = sorted({factors.r for factors in adapter.factors.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [
        f"| rank | {rank} |",
        f"| alpha | {config.lora_alpha:g}{rooted} |",
        f"| adapted modules | {len(adapter.factors)} |",
    ]
