"""Fields of PEFT's `LoraConfig` that lorica does not have: accepted where they ask for nothing, else refused.

Whoever sets one of them means something by it; leaving it out would train another model than the one asked
for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lorica.errors import ConfigError, lines, nearest


class _Foreign(NamedTuple):
    """A method that lorica does not carry: its name, what to do instead, and what asks for nothing."""

    method: str
    instead: str
    inert: Any = None


_PLAIN = "train plain LoRA, use_dora=True or use_rslora=True"
_FOREIGN = {
    "velora_config": _Foreign("VeLoRA", "to save memory, use gradient checkpointing with plain LoRA"),
    "kasa_config": _Foreign(
        "KaSA, which cuts off a part of the base's weights", f"{_PLAIN}; none of them touches the base"
    ),
    "alora_invocation_tokens": _Foreign(
        "activated LoRA", "train plain LoRA and turn it on where it should act with lorica.active"
    ),
    "monteclora_config": _Foreign("MonteCLoRA", f"{_PLAIN}, several times with other seeds for a spread"),
    "use_bdlora": _Foreign("BD-LoRA", "train plain LoRA; lorica.mixed runs many adapters in one batch"),
    "arrow_config": _Foreign(
        "Arrow routing", "choose the adapter of each row of a batch yourself with lorica.mixed"
    ),
    "use_qalora": _Foreign("QA-LoRA", "train plain LoRA beside the quantized base", False),
    "qalora_group_size": _Foreign("QA-LoRA", "leave it out", 16),
    "megatron_config": _Foreign(
        "Megatron's parallel layers", "adapt the model in transformers' form and shard it with fully_shard"
    ),
    "megatron_core": _Foreign("Megatron's parallel layers", "leave it out", "megatron.core"),
}
# Fields that say who wrote the file, or how PEFT ran, not what to do.
_PROVENANCE = ("peft_type", "peft_version", "auto_mapping", "runtime_config")


def without_foreign(
    fields: Mapping[str, Any], known: Collection[str], *, strict: bool = False
) -> dict[str, Any]:
    """The fields that lorica has; the others are dropped if they ask for nothing.

    Args:
        fields: by name, as a user or a file gives them.
        known: names of the fields that lorica has.
        strict: leave fields that PEFT does not have either as they are, for the caller to refuse.

    Raises:
        ConfigError: with the whole list of what is asked for and not carried, and what to do instead.
    """
    kept: dict[str, Any] = {}
    refused = []
    for name, value in fields.items():
        foreign = _FOREIGN.get(name)
        if name in known or (strict and foreign is None and name not in _PROVENANCE):
            kept[name] = value
        elif foreign is not None and value and value != foreign.inert:
            refused.append(f"{name}={value!r}: {foreign.method} is not carried; {foreign.instead}")
        elif foreign is None and name not in _PROVENANCE and value:
            refused.append(f"{name}={value!r}: not known{nearest(name, known)}")
    if refused:
        raise ConfigError(
            f"the configuration asks for what lorica does not support:\n{lines(refused)}\n"
            "Going on without would give another model than the one asked for."
        )
    return kept
