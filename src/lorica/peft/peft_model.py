"""`PeftModel`: PEFT's wrapper, name for name, around a model that lorica adapts in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import nn

import lorica
from lorica.checkpoint.hub import locate
from lorica.config import LoraConfig as CoreConfig
from lorica.errors import AdapterError, ConfigError, StateError, listing
from lorica.model.attach import attach_finite
from lorica.model.merged import as_unmerged
from lorica.model.structure import adapted
from lorica.peft import loading, places
from lorica.peft.base import let_gradients_in, match_base_dtype, put_again, recomputes
from lorica.peft.checks import mixed_rows
from lorica.peft.config import PeftType, TaskType, as_peft_config
from lorica.peft.incoming import Incoming
from lorica.peft.outgoing import Outgoing
from lorica.peft.recognition import apparent_class, tell_transformers
from lorica.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from lorica.peft.tuner import LoraModel


class PeftModel(Incoming, Outgoing):
    """A model with LoRA adapters, under PEFT's names.

    The model itself is adapted in place and stays what it was: ``get_base_model()`` is the model that was
    given. Parameters go by ``base_model.model.<their name in the model>``.

    Args:
        model: the base.
        peft_config: what to train.
        adapter_name: of the adapter.
        autocast_adapter_dtype: keep A and B in float32 beside a base of less precision; False gives them the
            base's.
        low_cpu_mem_usage: leave the adapter on the meta device, until its values are loaded.

    Raises:
        TargetError: a pattern matches nothing, or something that cannot be adapted.
        ConfigError: the model is wrapped already.
    """

    __class__ = apparent_class  # pyright: ignore[reportIncompatibleMethodOverride]
    _is_prompt_learning: ClassVar[bool] = False
    special_peft_forward_args = frozenset({"adapter_names", "alora_offsets"})

    def __init__(
        self,
        model: nn.Module,
        peft_config: CoreConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        _check_bare(model, "add_adapter(name, config)")
        self._wrap(LoraModel(model, as_peft_config(peft_config), adapter_name, low_cpu_mem_usage))
        if not autocast_adapter_dtype:
            match_base_dtype(self.get_base_model(), adapter_name)

    def _wrap(self, tuner: LoraModel) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_type = PeftType.LORA
        model = tuner.model
        if recomputes(model):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1
        tell_transformers(PeftModel)

    @classmethod
    def _around(cls, adapted: nn.Module) -> Self:
        """The wrapper around a model that carries adapters already."""
        self = cls.__new__(cls)
        self._wrap(LoraModel(adapted, None))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the class it is, whichever it appears to be."""
        return blank, (type(self),), self.__getstate__()

    def __getattr__(self, name: str) -> Any:
        """What is not here is the LoraModel's, or the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # before __init__, as copy and pickle ask
                raise
            return getattr(self.base_model, name)

    # What the model carries

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapter name → configuration."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Adapters that act, or would if they were not disabled."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The one that acts, a list where it is not one; what is assigned acts, and what trains stays."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        self.base_model.active_adapter = names

    @property
    def active_peft_config(self) -> Any:
        """Configuration of the adapter that acts.

        Raises:
            StateError: none does.
        """
        return self.peft_config[self.base_model.first_active]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts."""
        return bool(self.base_model.adapter_state.active)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train whole."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base's dtype, if it says."""
        return getattr(self.base_model, "dtype", None)

    @property
    def generation_config(self) -> Any:
        """How the model generates; what is set here is the model's own."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.get_base_model().generation_config = value

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters that train, and all."""
        count = self._count()
        return count.trainable, count.total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train."""
        print(self._count())

    def _count(self) -> lorica.ParameterCount:
        if not self.peft_config:
            return lorica.trainable_parameters(self)
        with as_unmerged(self):
            return lorica.trainable_parameters(self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See `lorica.peft.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See `lorica.peft.get_model_status`."""
        return get_model_status(self)

    # Calling it

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward.

        Args:
            args: the model's.
            adapter_names: an adapter for each row of the batch; ``"__base__"`` for none.
            kwargs: the model's.
        """
        model = self.get_base_model()
        with self._rows(adapter_names, kwargs):
            return model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; arguments as of `forward`."""
        with self._rows(adapter_names, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _rows(self, adapter_names: Sequence[str] | None, kwargs: dict[str, Any]) -> Any:
        if kwargs.pop("alora_offsets", None) is not None:
            raise ConfigError("alora_offsets: activated LoRA is not carried; train plain LoRA instead")
        if adapter_names is None:
            return nullcontext()
        if isinstance(adapter_names, str):
            raise ConfigError(f"adapter_names takes a name for each row, not one string {adapter_names!r}")
        if self.base_model.merged_adapters:
            raise StateError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` "
                "first."
            )
        names = [None if name == "__base__" else name for name in adapter_names]
        missing = sorted({name for name in names if name is not None and name not in self.peft_config})
        if missing:
            have = listing(map(repr, self.peft_config))
            raise AdapterError(
                f"Trying to infer with non-existing adapter(s): {', '.join(missing)}; the model has: {have}"
            )
        if self.base_model._resting is not None:  # what is disabled acts on no row
            for name in filter(None, names):
                self.base_model.adapter_state.known(name)
            return nullcontext()
        return mixed_rows(self.get_base_model(), names)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the embeddings' output carry gradients, which a recomputed block needs."""
        let_gradients_in(model)

    # Choosing

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let this adapter act alone; it trains, and the others do not.

        Args:
            adapter_name: of the adapter. For several at once: ``model.base_model.set_adapter([...])``.
            inference_mode: freeze it too.

        Raises:
            AdapterError: no such adapter.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or not.

        Raises:
            AdapterError: no such adapter.
        """
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base; what trains stays as it is."""
        before = self.base_model._resting
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if before is None:
                self.base_model.enable_adapter_layers()

    # From a folder

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: CoreConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on a model, in place.

        Args:
            model: the base.
            model_id: folder, or name on the Hub.
            adapter_name: to give it.
            is_trainable: whether it trains further. If not, the model goes into evaluation mode.
            config: in place of the saved one.
            autocast_adapter_dtype: as for the class.
            ephemeral_gpu_offload: accepted, and needless.
            low_cpu_mem_usage: accepted; nothing is ever initialised only to be overwritten.
            key_mapping: regular expression → replacement, for keys of modules renamed since.
            kwargs: ``subfolder``, ``revision``, ``token`` and whatever else downloads take.

        Returns:
            The model, wrapped by the class that the adapter's task asks for.

        Raises:
            FileError: a file is missing or damaged.
            ConfigError: the configuration asks for what lorica does not carry, or the model is wrapped
                already.
            AdapterError: with the whole list of what does not fit; the model is untouched.
        """
        _check_bare(model, "load_adapter(folder, name)")
        found, options = places.split_hub(kwargs)
        places.check_options(options)
        key_mapping = loading.conversions(model, key_mapping)
        chosen = None if config is None else as_peft_config(config)
        adapter = loading.read(locate(model_id, **found), chosen, key_mapping)
        if options.get("ignore_mismatched_sizes"):
            adapter = loading.fitting(adapter, model.state_dict())
        ready = loading.as_trainable(adapter, is_trainable)
        put_again(model, adapter_name, lambda name: attach_finite(model, ready, name, trainable=is_trainable))
        lorica.active(model, adapter_name)
        if chosen is not None:  # the caller's own, which says from now on how it was made
            state = adapted(model)[1]
            chosen.__dict__.update(vars(state.configs[adapter_name]))
            state.configs[adapter_name] = chosen
        task = adapter.config.task_type
        wrapped = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task or "", cls)._around(model)
        if not autocast_adapter_dtype:
            match_base_dtype(model, adapter_name)
        return wrapped if is_trainable else wrapped.eval()


def _check_bare(model: nn.Module, instead: str) -> None:
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"the model is a PeftModel already; model.{instead} gives it another adapter, model.unload() the "
            "base back"
        )


class _WithHead(PeftModel):
    """A model whose task brought a new head, which every adapter trains whole."""

    task: ClassVar[TaskType]

    def add_adapter(self, adapter_name: str, peft_config: CoreConfig, *args: Any, **kwargs: Any) -> None:
        """As `PeftModel.add_adapter`; the adapter is for this model's task, and has a head of its own."""
        config = as_peft_config(peft_config)
        if config.task_type is None:
            config = config.replace(task_type=self.task)
        super().add_adapter(adapter_name, config, *args, **kwargs)


class PeftModelForSequenceClassification(_WithHead):
    """A classifier of sequences; its new head trains whole."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(_WithHead):
    """A classifier of tokens; its new head trains whole."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(_WithHead):
    """A model that marks answers in a text; its new head trains whole."""

    task = TaskType.QUESTION_ANS


class PeftModelForCausalLM(PeftModel):
    """A causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A sequence-to-sequence language model."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model that returns hidden states."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def blank(cls: type[PeftModel]) -> PeftModel:
    """An empty instance, for unpickling."""
    return cls.__new__(cls)
