"""`LoraConfig`: what to train, in PEFT's own field names and JSON."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from lorica.config.checks import check
from lorica.config.inits import (
    SETTINGS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    changes_base,
    check_init,
    without_idle,
)
from lorica.config.patterns import exactly, first_match
from lorica.errors import ConfigError

C = TypeVar("C")

# Fields that record who wrote the file, or how PEFT ran (merge_weights: PEFT before 0.4).
PROVENANCE = frozenset(("peft_type", "peft_version", "auto_mapping", "runtime_config", "merge_weights"))
FIELD_READERS: list[Callable[..., dict[str, Any]]] = []
"""(fields, known names, strict=False) → the known fields; what others ask for is refused, if anything."""


def _is_row(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, Mapping))


def _known(fields: Mapping[str, Any], known: Collection[str], *, strict: bool = False) -> Mapping[str, Any]:
    """The fields that `LoraConfig` has, as `FIELD_READERS` read them."""
    for read in FIELD_READERS:
        fields = read(fields, known, strict=strict)
    return fields


def _knowing_pefts_fields(cls: type[C]) -> type[C]:
    """Let a configuration be made with all that PEFT's can be made with, if it asks for nothing more."""
    known = frozenset(item.name for item in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
    make = cls.__init__

    @functools.wraps(make)
    def __init__(self: Any, **fields: Any) -> None:
        make(self, **(fields if fields.keys() <= known else _known(fields, known, strict=True)))

    cls.__init__ = __init__
    return cls


@_knowing_pefts_fields
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to train: ``h = W0·x + scale·B·A·x`` beside each targeted weight (Hu et al., 2021, eq. 3).

    Field names, defaults and JSON are PEFT's, so one `adapter_config.json` serves both.

    Args:
        r: rank of each update; the inner dimension of B·A. At least 1.
        lora_alpha: numerator of the scale α/r (α/√r with `use_rslora`).
        lora_dropout: probability in [0, 1) of dropping an input of A, in training only.
        target_modules: modules to adapt. A list matches whole names or dotted suffixes (``"query"`` finds
            every ``….query``); a string is a regular expression over the full name; ``"all-linear"`` takes
            every linear layer but the output head; None takes the architecture's attention query and value
            projections.
        target_parameters: parameters to adapt that are no layer's weight, such as the stacked weights of a
            mixture of experts: ``["mlp.experts.gate_up_proj"]``. Whole names or dotted suffixes; each a
            matrix (d_out, d_in) or a stack of them, of which every expert has an update of rank `r`. Not with
            dropout, `use_dora` or `lora_bias`. With ``target_modules=[]`` nothing else is adapted.
        exclude_modules: modules to leave out, matched like `target_modules`.
        bias: which of the base's biases train as well: ``"none"``, ``"all"``, or ``"lora_only"`` (those of
            the adapted layers).
        lora_bias: train a bias b on B too: the update of an output is ``scale·(B·A·x + b)``. For linear
            layers and convolutions, without `use_dora`.
        use_dora: train the magnitude of each output's weights too, and let B·A turn their direction (Liu et
            al., 2024).
        use_rslora: scale by α/√r, so that large ranks keep learning (Kalajdzievski, 2023).
        variant: name of a variant of the layers' output that was registered (`lorica.layers.variants`); None
            for LoRA itself, or what `use_dora` and `lora_bias` say.
        modules_to_save: modules trained and saved whole, such as a new classification head.
        trainable_token_indices: rows of the input embedding to train by themselves, such as those of new
            tokens; of other tables, a map from their names. What is tied to the input embedding, as a rule
            the output head, uses the same rows. For tables that neither `target_modules` nor
            `modules_to_save` names.
        ensure_weight_tying: where an embedding that `target_modules` or `modules_to_save` names shares its
            table with others, as a rule with the output head, give all of them one update, or train one copy
            for all: they stay equal, and merged they are tied again. Not with `use_dora`.
        init_lora_weights: how A and B start. True: A Kaiming-uniform, B zero; ``"gaussian"``: A normal with
            standard deviation 1/r, B zero; ``"orthogonal"``: neither zero, their product is; ``"pissa"``,
            ``"pissa_niter_N"``, ``"olora"``, ``"corda"``, ``"lora_ga"``, ``"loftq"``: taken out of W0;
            ``"eva"``: A from the inputs, B zero; False: both random, so the model changes at once (for
            tests).
        loftq_config: settings of ``"loftq"``; None takes the defaults of `LoftQConfig`.
        eva_config: settings of ``"eva"``; None takes the defaults of `EvaConfig`.
        corda_config: settings of ``"corda"``; None takes the defaults of `CordaConfig`.
        lora_ga_config: settings of ``"lora_ga"``; None takes the defaults of `LoraGAConfig`.
        rank_pattern: name or regular expression → rank, where it differs from `r`. The first match wins.
        alpha_pattern: name or regular expression → alpha, where it differs from `lora_alpha`.
        layers_to_transform: indices of the transformer blocks to adapt; None adapts all.
        layers_pattern: name of the list that holds the blocks (``"layers"``, ``"h"``), or a regular
            expression of the end of its path; None accepts any.
        layer_replication: ranges ``[start, end)`` of blocks that make a deeper model, sharing weights, each
            block with updates of its own: ``[[0, 4], [2, 6]]`` gives 0 1 2 3 2 3 4 5. The other settings
            count the new blocks.
        fan_in_fan_out: the weight is stored (in, out), as in transformers' Conv1D. Detected, so there is no
            need to set it.
        task_type: one of ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"QUESTION_ANS"``, ``"CAUSAL_LM"``,
            ``"SEQ_2_SEQ_LM"``, ``"FEATURE_EXTRACTION"``, or None. The first three train the model's new head
            too.
        inference_mode: attach the adapter frozen.
        base_model_name_or_path: the base the adapter belongs to. Filled in by `adapt`.
        revision: revision of that base.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    keeps_idle: ClassVar[bool] = False
    """Whether settings of a start that is not the one chosen may stand there, as PEFT lets them."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    variant: str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    loftq_config: LoftQConfig | None = None
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[list[int]] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Normalise lists and check every value."""
        for name in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        ):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                # A set has no order of its own; sorted, the file it is saved to is the same every time.
                object.__setattr__(
                    self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value)
                )
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            value = {} if value is None else value
            object.__setattr__(self, name, dict(value) if isinstance(value, Mapping) else value)
        ranges = self.layer_replication
        if isinstance(ranges, (list, tuple)):
            ranges = [list(part) if isinstance(part, tuple) else part for part in ranges]
            object.__setattr__(self, "layer_replication", ranges or None)
        tokens: Any = self.trainable_token_indices
        if isinstance(tokens, Mapping):
            tokens = {key: list(value) if _is_row(value) else value for key, value in tokens.items()}
        object.__setattr__(self, "trainable_token_indices", list(tokens) if _is_row(tokens) else tokens)
        if self.task_type is not None:
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
        if isinstance(self.init_lora_weights, str):
            object.__setattr__(self, "init_lora_weights", self.init_lora_weights.lower())
        for name, settings in SETTINGS.items():
            value = getattr(self, name)
            value = None if value is None or value == {} else settings.from_value(value)
            if value is None and self.init_lora_weights == settings.belongs_to:
                value = settings()
            object.__setattr__(self, name, value)
        check(self)
        if self.init_lora_weights is not True or any(getattr(self, name) is not None for name in SETTINGS):
            check_init(self)

    def rank(self, path: str) -> int:
        """Rank of the module at `path`: `rank_pattern` where it matches, else `r`."""
        return first_match(self.rank_pattern, path, self.r) if self.rank_pattern else self.r

    def alpha(self, path: str) -> float:
        """Alpha of the module at `path`: `alpha_pattern` where it matches, else `lora_alpha`."""
        return (
            first_match(self.alpha_pattern, path, self.lora_alpha) if self.alpha_pattern else self.lora_alpha
        )

    def scale(self, path: str) -> float:
        """Scale of the module's update: α/r, or α/√r with `use_rslora`, after the patterns."""
        r, alpha = self.rank(path), self.alpha(path)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def with_outputs(self, attentions: Iterable[str]) -> Self:
        """A copy in which the output projections of attentions have the attentions' ranks and alphas.

        The name of an `nn.MultiheadAttention` means its `out_proj` too, and so do patterns that match it, as
        in PEFT, unless others name the projection itself.

        Args:
            attentions: paths of those that are adapted with their projections.
        """
        ranks, alphas = dict(self.rank_pattern), dict(self.alpha_pattern)
        for path in attentions:
            out = f"{path}.out_proj"
            if first_match(ranks, out, None) is None and self.rank(path) != self.r:
                ranks[exactly(out)] = self.rank(path)
            if first_match(alphas, out, None) is None and self.alpha(path) != self.lora_alpha:
                alphas[exactly(out)] = self.alpha(path)
        if len(ranks) == len(self.rank_pattern) and len(alphas) == len(self.alpha_pattern):
            return self
        return self.replace(rank_pattern=ranks, alpha_pattern=alphas)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(
            self,
            **(without_idle(changes) if "init_lora_weights" in changes and not self.keeps_idle else changes),
        )

    def as_found(self, **changes: Any) -> Self:
        """A copy with some fields as they turned out on a model, which need no check."""
        found = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(found, name, value)
        return found

    def parts(self) -> tuple[Self, ...]:
        """The configurations of the single methods that make up the adapter: this one."""
        return (self,)

    def members(self) -> tuple[Self, list[Any]]:
        """The LoRA among the adapter's methods, and the other methods."""
        return self, []

    def asks(self) -> set[str]:
        """Names under which kinds of pieces register: "lora", each field that is set, "residual" of W0."""
        asked = {"lora", *(name for name, value in vars(self).items() if value and value != "none")}
        value = self.init_lora_weights
        return {*asked, "residual"} if value is not True and changes_base(value) else asked

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them, ``peft_type`` included."""
        # PEFT's file has an empty dictionary where there are no settings of LoftQ.
        unset = {} if self.loftq_config else {"loftq_config": {}}
        fields = {"peft_type": "LORA", **dataclasses.asdict(self), **unset}
        if self.variant is None:  # a field that PEFT does not have
            del fields["variant"]
        return fields

    def plain(self) -> Self:
        """The configuration of the same update as seen from W0 itself.

        A start that was taken out of W0 becomes a second half of the rank, which takes it off again.
        """
        return self.doubled() if changes_base(self.init_lora_weights) else self

    def doubled(self) -> Self:
        """The configuration of an update with another of the same rank and scale beside it."""
        alpha = math.sqrt(2) if self.use_rslora else 2
        idle = dict.fromkeys(SETTINGS)
        return self.replace(
            **idle,
            r=2 * self.r,
            lora_alpha=alpha * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: alpha * value for key, value in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the fields of an `adapter_config.json`, PEFT's or lorica's.

        Raises:
            ConfigError: another method's file, or a setting that lorica does not know and so cannot honour.
        """
        method = data.get("peft_type", "LORA")
        if str(getattr(method, "value", method)).upper() != "LORA":
            raise ConfigError(f"peft_type is {method!r}; this is not a LoRA adapter")
        known = {item.name for item in dataclasses.fields(cls)}
        strange = data.keys() - known - PROVENANCE
        kept = _known(data, known) if strange else {key: data[key] for key in known & data.keys()}
        # PEFT lets settings of another start stand beside the one that is used.
        start = data.get("init_lora_weights")
        start = start.lower() if isinstance(start, str) else start
        idle = (
            set()
            if cls.keeps_idle
            else {name for name, settings in SETTINGS.items() if start != settings.belongs_to}
        )
        # PEFT writes null for a pattern or list that was never set.
        return cls(**{key: value for key, value in kept.items() if value is not None and key not in idle})
