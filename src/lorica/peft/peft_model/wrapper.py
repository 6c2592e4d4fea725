"""`PeftModel` without files: a wrapper that lists a model's adapters, calls the model, and chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

import lorica
from lorica.config import LoraConfig
from lorica.errors import ConfigError
from lorica.model.merging.merged import as_unmerged
from lorica.peft.config import PeftType, as_peft_config
from lorica.peft.peft_model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
)
from lorica.peft.tuners.lora.model import LoraModel
from lorica.peft.tuners.tuners_utils import cast_adapter_dtype
from lorica.peft.utils.integrations import apparent_class, tell_transformers
from lorica.peft.utils.other import warn_of_name


class Wrapper(nn.Module):
    """A `PeftModel` in memory; `PeftModel` documents arguments and errors."""

    __class__ = apparent_class  # pyright: ignore[reportIncompatibleMethodOverride]
    _is_prompt_learning: ClassVar[bool] = False
    special_peft_forward_args = frozenset({"adapter_names", "alora_offsets"})

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        check_bare(model, "add_adapter(name, config)")
        self._wrap(LoraModel(model, as_peft_config(peft_config), adapter_name, low_cpu_mem_usage))
        cast_adapter_dtype(self.get_base_model(), adapter_name, autocast_adapter_dtype)

    def _wrap(self, tuner: LoraModel) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_type = PeftType.LORA
        model = tuner.model
        if _recomputes(model):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1
        tell_transformers(Wrapper)

    @classmethod
    def _around(cls, adapted: nn.Module) -> Self:
        """A wrapper around a model that already carries adapters."""
        self = cls.__new__(cls)
        self._wrap(LoraModel(adapted, None))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as its real class, whatever `__class__` says."""
        return blank, (type(self),), self.__getstate__()

    def __getattr__(self, name: str) -> Any:
        """Other attributes are the LoraModel's, or the model's."""
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
        """Names of the active adapters, also while they are disabled."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if there is not exactly one; may be assigned."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        self.base_model.active_adapter = names

    @property
    def active_peft_config(self) -> Any:
        """Configuration of the active adapter.

        Raises:
            StateError: no adapter is active.
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
        """The model's generation settings; assigning sets the model's."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.get_base_model().generation_config = value

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of parameters that train, and of all parameters."""
        count = self._count()
        return count.trainable, count.total

    def print_trainable_parameters(self) -> None:
        """Print the number of parameters that train."""
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
            adapter_names: an adapter's name per row of the batch; ``"__base__"`` for none.
            kwargs: the model's.
        """
        model = self.get_base_model()
        with self.base_model.rows(adapter_names, kwargs):
            return model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; arguments as of `forward`."""
        with self.base_model.rows(adapter_names, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the embeddings' output require gradients, which recomputed blocks need."""
        quantized = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if any(getattr(model, flag, False) for flag in quantized):
            return
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_require_grads)  # pyright: ignore

    # Choosing

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let this adapter alone act; it trains, and the others do not.

        Args:
            adapter_name: name of the adapter. For several: ``model.base_model.set_adapter([...])``.
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
        """A context in which no adapter acts; `requires_grad` stays as it is."""
        before = self.base_model._resting
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if before is None:
                self.base_model.enable_adapter_layers()

    # Coming and going

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, which neither acts nor trains before `set_adapter`.

        Args:
            adapter_name: name of the adapter.
            peft_config: its configuration.
            low_cpu_mem_usage: accepted without effect: no value is initialised twice.
            autocast_adapter_dtype: as for the class.

        Raises:
            AdapterError: the name is taken or not valid.
            TargetError: a pattern matches nothing, or a module that cannot be adapted.
        """
        warn_of_name(adapter_name)
        self.base_model.inject_adapter(as_peft_config(peft_config), adapter_name, low_cpu_mem_usage)
        cast_adapter_dtype(self.base_model.model, adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it alone acted, the first remaining one acts.

        Raises:
            AdapterError: no such adapter.
            StateError: it is merged.
        """
        self.base_model.delete_adapter(adapter_name)


def check_bare(model: nn.Module, instead: str) -> None:
    """Refuse a model that is wrapped already.

    Args:
        model: the model.
        instead: the method to call, for the message.

    Raises:
        ConfigError: the model is wrapped.
    """
    if isinstance(model, Wrapper):
        raise ConfigError(
            f"the model is a PeftModel already; model.{instead} gives it another adapter, model.unload() the "
            "base back"
        )


def _recomputes(model: nn.Module) -> bool:
    """Whether a model recomputes activations; True if it does not say."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((name for name in names if hasattr(type(model), name)), None)
    return True if name is None else bool(getattr(model, name))


def _require_grads(module: nn.Module, args: object, output: Tensor) -> None:
    output.requires_grad_(True)


def blank(cls: type[Wrapper]) -> Wrapper:
    """An empty instance, for unpickling."""
    return cls.__new__(cls)
