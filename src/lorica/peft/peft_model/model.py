"""`PeftModel`: PEFT's wrapper around a model that lorica adapts in place, with files in and out."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint.hub import locate
from lorica.config import LoraConfig
from lorica.errors import ConfigError, LoricaWarning, listing
from lorica.model.adapt import attach_finite
from lorica.model.files import overwrite
from lorica.peft.config import TaskType, as_peft_config, check_options, split_hub
from lorica.peft.peft_model.wrapper import Wrapper, check_bare
from lorica.peft.tuners.lora.model import on_untouched_base
from lorica.peft.tuners.tuners_utils import cast_adapter_dtype
from lorica.peft.utils.other import put_again
from lorica.peft.utils.save_and_load import LoadResult, conversions, outgoing, read
from lorica.state import adapted

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}


class PeftModel(Wrapper):
    """A model with LoRA adapters, under PEFT's names.

    The model itself is adapted in place and stays what it was: ``get_base_model()`` is the model that was
    given. Parameters go by ``base_model.model.<their name in the model>``.

    Args:
        model: the base.
        peft_config: configuration of the adapter.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: keep A and B in float32 beside a base of lower precision; False gives them the
            base's dtype.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted.
        ConfigError: the model is wrapped already.
    """

    task: ClassVar[TaskType]

    def __init_subclass__(cls, task: TaskType | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            cls.task = task
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] = cls

    # From a folder

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
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
            adapter_name: its name on the model.
            is_trainable: whether it trains further. If not, the model goes into evaluation mode.
            config: replaces the saved one.
            autocast_adapter_dtype: as for the class.
            ephemeral_gpu_offload: accepted without effect.
            low_cpu_mem_usage: accepted without effect: no value is initialised only to be overwritten.
            key_mapping: regular expression → replacement, for keys of modules renamed since.
            kwargs: ``subfolder``, ``revision``, ``token`` and other options of downloads.

        Returns:
            The model, wrapped by the class of the adapter's task.

        Raises:
            FileError: a file is missing or damaged.
            ConfigError: the configuration asks for a feature that lorica does not have, or the model is
                wrapped already.
            AdapterError: lists the tensors that do not fit; the model is untouched.
        """
        check_bare(model, "load_adapter(folder, name)")
        found, options = split_hub(kwargs)
        check_options(options)
        key_mapping = conversions(model, key_mapping)
        chosen = None if config is None else as_peft_config(config)
        adapter = read(locate(model_id, **found), chosen, key_mapping)
        if options.get("ignore_mismatched_sizes"):
            adapter = fitting(adapter, model.state_dict())
        ready = as_trainable(adapter, is_trainable)
        put_again(model, adapter_name, lambda name: attach_finite(model, ready, name, trainable=is_trainable))
        lorica.active(model, adapter_name)
        if chosen is not None:  # the caller's own configuration, which takes the saved settings
            state = adapted(model)[1]
            chosen.__dict__.update(vars(state.configs[adapter_name]))
            state.configs[adapter_name] = chosen
        task = adapter.config.task_type
        wrapped = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task or "", cls)._around(model)
        cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Add a saved adapter, which does not act yet; an existing one of that name takes the saved values.

        Args:
            model_id: folder, or name on the Hub.
            adapter_name: its name on the model.
            is_trainable: whether it trains further. If not, the model goes into evaluation mode.
            torch_device: accepted without effect: the adapter is placed with its base.
            autocast_adapter_dtype: as for the class.
            ephemeral_gpu_offload: accepted without effect.
            low_cpu_mem_usage: accepted without effect.
            key_mapping: as for `from_pretrained`, whose errors this raises too.
            kwargs: as for `from_pretrained`.

        Returns:
            Two empty lists: a tensor that does not fit is an error.

        Warns:
            LoricaWarning: the existing adapter has another scale, tokens or start than the saved values.
        """
        found, options = split_hub(kwargs)
        check_options(options)
        folder = locate(model_id, **found)
        model, before = self.base_model.model, self.base_model.adapter_state.active
        there = adapter_name in self.base_model.peft_config
        adapter = read(folder, key_mapping=conversions(model, key_mapping))
        if options.get("ignore_mismatched_sizes"):
            live = lorica.extract(model, adapter_name).extras if there else None
            adapter = fitting(adapter, live or model.state_dict())
        if there:
            # PEFT loads the values alone, whatever the present settings make of them.
            overwrite(model, adapter, adapter_name, strict=False)
        else:
            attach_finite(model, as_trainable(adapter, is_trainable), adapter_name, trainable=is_trainable)
            if self.base_model._resting is not None:
                lorica.active(model, before)
        cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    # To a folder, to the Hub

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters to a folder: "default" to the folder itself, others to folders of their names in it.

        Args:
            save_directory: created if missing.
            safe_serialization: False writes `adapter_model.bin`, a pickle of tensors.
            selected_adapters: names; None takes all.
            save_embedding_layers: True writes the base's embedding tables too; "auto" does so where the
                vocabulary was resized; False never.
            is_main_process: other processes write nothing.
            path_initial_model_for_weight_conversion: folder with the adapter before training, if its start
                changed the base (PiSSA, OLoRA, CorDA, LoRA-GA): writes an adapter of twice the rank that does
                the same on the untouched base.
            state_dict: take the values from here, by their live names.
            kwargs: ``save_function``, which accelerate's scripts pass; accepted without effect.

        Raises:
            AdapterError: no such adapter; `state_dict` is another adapter's; or a tensor holds NaN or
                infinity.
            ConfigError: another argument.
            FileError: the folder cannot be written.
        """
        if unknown := kwargs.keys() - {"save_function"}:
            raise ConfigError(f"save_pretrained of an adapter takes no {listing(sorted(unknown))}")
        names = self._selected(selected_adapters)
        if is_main_process:
            for name in names:
                adapter = outgoing(self, name, state_dict, save_embedding_layers)
                if path_initial_model_for_weight_conversion is not None:
                    adapter = on_untouched_base(adapter, path_initial_model_for_weight_conversion)
                folder = Path(save_directory) if name == "default" else Path(save_directory) / name
                checkpoint.write(adapter, folder, pickled=not safe_serialization)

    def _selected(self, names: Sequence[str] | None) -> list[str]:
        """The names of the adapters to write, checked."""
        if isinstance(names, str):
            raise ConfigError(f"selected_adapters takes a list of names, not one string {names!r}")
        state = self.base_model.adapter_state
        return list(state.configs) if names is None else [state.known(name) for name in names]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        selected_adapters: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload adapters, a commit for each: "default" to the top, others to folders of their names.

        Args:
            repo_id: name of the repository, ``"user/sentiment"``; created if missing.
            commit_message: title of the commit.
            private: whether a new repository is private; None takes the account's default.
            token: of the account; None takes that of ``HF_TOKEN`` or ``hf auth login``.
            revision: branch; created if missing.
            create_pr: open a pull request instead of committing.
            selected_adapters: names; None takes all.
            kwargs: ``use_auth_token``, the old name of `token`; ``use_temp_dir`` and ``max_shard_size``,
                accepted without effect.

        Returns:
            URL of the last commit, or of the pull request.

        Raises:
            AdapterError: no such adapter.
            ConfigError: another argument.
            FileError: the Hub cannot be reached or refuses.
            MissingExtra: huggingface_hub is not installed.
        """
        if unknown := kwargs.keys() - {"use_auth_token", "use_temp_dir", "max_shard_size"}:
            raise ConfigError(f"push_to_hub of an adapter takes no {listing(sorted(unknown))}")
        token = kwargs.get("use_auth_token") if token is None else token
        url = ""
        for name in self._selected(selected_adapters):
            url = lorica.push_to_hub(
                outgoing(self, name),
                repo_id,
                subfolder=None if name == "default" else name,
                revision=revision,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return url

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the model card of the active adapter; an edited card stays.

        Raises:
            StateError: no adapter is active.
            FileError: the folder cannot be written.
        """
        adapter = outgoing(self, self.base_model.first_active, None, False)
        checkpoint.write_card(adapter, Path(output_dir))


class _WithHead(PeftModel):
    """A model whose task has a new head, which every adapter trains whole."""

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        """As `PeftModel.add_adapter`; the adapter is for this model's task, and has its own head."""
        config = as_peft_config(peft_config)
        if config.task_type is None:
            config = config.replace(task_type=self.task)
        super().add_adapter(adapter_name, config, *args, **kwargs)


class PeftModelForSequenceClassification(_WithHead, task=TaskType.SEQ_CLS):
    """A classifier of sequences; its new head trains whole."""


class PeftModelForTokenClassification(_WithHead, task=TaskType.TOKEN_CLS):
    """A classifier of tokens; its new head trains whole."""


class PeftModelForQuestionAnswering(_WithHead, task=TaskType.QUESTION_ANS):
    """A model that marks answers in a text; its new head trains whole."""


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A causal language model."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """A sequence-to-sequence language model."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model that returns hidden states."""


def as_trainable(adapter: Adapter, trainable: bool) -> Adapter:
    """The adapter with `inference_mode` in its configuration set by whether it trains."""
    told = adapter.trained_as
    return dataclasses.replace(
        adapter,
        config=adapter.config.replace(inference_mode=not trainable),
        trained_as=None if told is None else told.replace(inference_mode=not trainable),
    )


def fitting(adapter: Adapter, own: Mapping[str, Tensor]) -> Adapter:
    """The adapter, its whole tensors of another shape than the model's replaced by the model's.

    Args:
        adapter: the saved adapter.
        own: the model's tensors by name.

    Warns:
        LoricaWarning: naming the tensors left out.
    """
    wrong = [n for n, tensor in adapter.extras.items() if n in own and own[n].shape != tensor.shape]
    if wrong:
        warnings.warn(
            f"of another shape than in this model, and so left as the model has it: {listing(wrong)}",
            LoricaWarning,
            stacklevel=3,
        )
    kept = {**adapter.extras, **{name: own[name].detach() for name in wrong}}
    return dataclasses.replace(adapter, extras=kept)
