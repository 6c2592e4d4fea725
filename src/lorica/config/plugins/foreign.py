"""Fields of PEFT's `LoraConfig` that lorica lacks: accepted where they ask for nothing, otherwise refused.

A field that is set has a purpose; ignoring it would train another model than the one asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lorica.config.lora import FIELD_READERS, PROVENANCE
from lorica.errors import ConfigError, LoricaWarning, UnknownField, lines, listing, nearest


class _Foreign(NamedTuple):
    """A method that lorica lacks: its name, what to do instead, and the values that ask for nothing."""

    method: str
    instead: str
    inert: Any = None


_PLAIN = "train plain LoRA, use_dora=True or use_rslora=True"
FOREIGN = {
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
    "enable_lora": _Foreign(
        "an update of parts of a fused projection",
        "convert it with `lorica convert`, from loralib's own file",
    ),
    "megatron_config": _Foreign(
        "Megatron's parallel layers", "adapt the model in transformers' form and shard it with fully_shard"
    ),
    "megatron_core": _Foreign("Megatron's parallel layers", "leave it out", "megatron.core"),
}


def without_foreign(
    fields: Mapping[str, Any], known: Collection[str], *, strict: bool = False
) -> dict[str, Any]:
    """The fields that lorica has; others are dropped if they ask for nothing.

    Args:
        fields: name → value, from a user or a file.
        known: names of the fields that lorica has.
        strict: keep fields that are not PEFT's either, for the caller to refuse.

    Raises:
        ConfigError: lists the fields that ask for something lorica lacks, and what to do instead.
        UnknownField: an unknown field in a file that PEFT did not write.

    Warns:
        LoricaWarning: names unknown fields in a file of PEFT's; a later PEFT wrote it.
    """
    kept: dict[str, Any] = {}
    refused, unknown = [], []
    for name, value in fields.items():
        foreign = FOREIGN.get(name)
        if name in known or (strict and foreign is None and name not in PROVENANCE):
            kept[name] = value
        elif foreign is not None and value and value != foreign.inert:
            refused.append(f"{name}={value!r}: {foreign.method} is not carried; {foreign.instead}")
        elif foreign is None and name not in PROVENANCE and value:
            unknown.append(name)
    if refused:
        raise ConfigError(
            f"the configuration asks for what lorica does not support:\n{lines(refused)}\n"
            "Going on without would give another model than the one asked for."
        )
    if unknown:
        hints = listing(f"{name}={fields[name]!r}{nearest(name, known)}" for name in sorted(unknown))
        if "peft_type" not in fields:
            raise UnknownField(
                f"The LoraConfig config that is trying to be loaded is missing required keys: "
                f"{{'peft_type'}}. So it is no file of PEFT's, and these fields are not known: {hints}"
            )
        warnings.warn(
            f"Unexpected keyword arguments {sorted(unknown)} for class LoraConfig, these are ignored. A "
            "later PEFT has them, or they are misspelt; if they change what is computed, this is another "
            f"model: {hints}",
            LoricaWarning,
            stacklevel=4,
        )
    return kept


FIELD_READERS.append(without_foreign)
