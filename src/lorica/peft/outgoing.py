"""What `PeftModel` does with adapters on their way out: to a folder, to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lorica
from lorica import checkpoint
from lorica.errors import ConfigError, listing
from lorica.peft import saving
from lorica.peft.tuner import LoraModel


class Outgoing(nn.Module):
    """The part of `PeftModel` that writes."""

    base_model: LoraModel

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
            save_directory: made if it is not there.
            safe_serialization: False writes `adapter_model.bin`, a pickle of tensors.
            selected_adapters: names; None takes all.
            save_embedding_layers: True writes the base's embedding tables too; "auto" does so where the
                vocabulary was resized; False never.
            is_main_process: other processes write nothing.
            path_initial_model_for_weight_conversion: folder with the adapter as it was before training, where
                its start changed the base (PiSSA, OLoRA, CorDA, LoRA-GA): writes one of twice the rank that
                does the same on the untouched base.
            state_dict: take the values from here, by their live names.
            kwargs: ``save_function``, which accelerate's scripts pass; accepted, and needless.

        Raises:
            AdapterError: no such adapter; `state_dict` is not of it; or a tensor holds NaN or infinity.
            ConfigError: another argument.
            FileError: the folder cannot be written.
        """
        if unknown := kwargs.keys() - {"save_function"}:
            raise ConfigError(f"save_pretrained of an adapter takes no {listing(sorted(unknown))}")
        names = self._selected(selected_adapters)
        if is_main_process:
            for name in names:
                adapter = saving.outgoing(self, name, state_dict, save_embedding_layers)
                if path_initial_model_for_weight_conversion is not None:
                    adapter = saving.on_untouched_base(adapter, path_initial_model_for_weight_conversion)
                folder = Path(save_directory) if name == "default" else Path(save_directory) / name
                checkpoint.write(adapter, folder, pickled=not safe_serialization)

    def _selected(self, names: Sequence[str] | None) -> list[str]:
        """The adapters to write, all of which there are."""
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
            repo_id: name of the repository, ``"user/sentiment"``; made if need be.
            commit_message: title of the commit.
            private: whether a new repository is; None takes the account's default.
            token: of the account; None takes the one of ``HF_TOKEN`` or ``hf auth login``.
            revision: branch; made if it is not there.
            create_pr: open a pull request in place of committing.
            selected_adapters: names; None takes all.
            kwargs: ``use_auth_token``, the old name of `token`; ``use_temp_dir`` and ``max_shard_size``,
                accepted and needless.

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
                saving.outgoing(self, name),
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
        """Write the model card of the adapter that acts; one that somebody edited stays.

        Raises:
            StateError: none does.
            FileError: the folder cannot be written.
        """
        adapter = saving.outgoing(self, self.base_model.first_active, None, False)
        checkpoint.write_card(adapter, Path(output_dir))
