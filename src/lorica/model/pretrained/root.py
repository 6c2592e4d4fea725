"""The root of a transformers model: while it carries adapters, saving it saves them.

Its class is swapped under its own name (label smoothing looks the name up), with a `save_pretrained` that
writes the adapter alone, as it does after transformers' own `add_adapter`. So even the plain Trainer writes
adapter-only checkpoints.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lorica import checkpoint
from lorica.checkpoint.peft import CONFIG_FILE
from lorica.errors import ConfigError, FileError
from lorica.layers import SwappedModule
from lorica.model.files import extract
from lorica.model.pretrained import trainers
from lorica.model.pretrained.vocabulary import resize_part, resized, with_resized_tables
from lorica.model.sharded import once, part_of
from lorica.state import STATE, AdapterState, adapted, find_adapted, in_group
from lorica.tree import walk

_SAVE = "save_pretrained"


class _Asked:
    """The model's own class attribute; who asks for it is a trainer that is just being made.

    One that is set on the model itself comes before it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        trainers.tell()
        asked: Any = owner if model is None else model
        return getattr(super(Pretrained, asked), self.name)


class Pretrained(SwappedModule):
    """A transformers model that carries adapters."""

    label: ClassVar[str] = ""
    own_attributes: ClassVar[tuple[str, ...]] = ()
    outermost: ClassVar[bool] = True
    accepts_loss_kwargs = _Asked()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = cls.__dict__.get("base_class")
        if base is not None and hasattr(base, "generate"):

            @functools.wraps(base.generate)
            def generate(self: Pretrained, *args: Any, **kwargs: Any) -> Any:
                with _repeating(self, args, kwargs):
                    return base.generate(self, *args, **kwargs)

            cls.generate = generate  # type: ignore[attr-defined]

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether adapters stand on a quantized model: transformers' Trainer asks before it trains one."""
        return self.__dict__.get("_hf_peft_config_loaded", getattr(self, "is_quantized", False))

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        self.__dict__["_hf_peft_config_loaded"] = value

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapters, not the base.

        An only adapter, or the one named "default", goes into the folder itself; each other into a folder of
        its name inside it, as PEFT lays them out. To write merged weights, `lorica.merge` first: then this is
        the model's own `save_pretrained` again.

        Args:
            save_directory: folder; created if missing.
            is_main_process: other processes write nothing. Where each holds a part of the model, all of them
                must call this, and the first writes.
            state_dict: take the values from here, by their live names (sharded training gathers them so).
            push_to_hub: not done here; `lorica.push_to_hub` does it.
            kwargs: transformers' other arguments; those about the format of full weights have no meaning for
                adapters.

        Raises:
            ConfigError: asked for pickled files, or to push.
        """
        if push_to_hub:
            raise ConfigError(
                "save_pretrained(push_to_hub=True) is not done for adapters; call "
                "lorica.push_to_hub(model, 'user/name')"
            )
        if kwargs.get("safe_serialization") is False:
            raise ConfigError("lorica writes safetensors only; leave out safe_serialization=False")
        together = state_dict is None and in_group() and part_of(self) is not None
        if not is_main_process and not together:
            return
        for name, folder in self._folders(save_directory):
            adapter = extract(self, name, state_dict=state_dict)
            content = with_resized_tables(adapter, self, state_dict)
            write = functools.partial(checkpoint.write, content, folder)
            _ = once(self, write, folder) if together else write()

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the adapters' model cards, which transformers' Trainer asks for; one that is there stays."""
        for name, folder in self._folders(output_dir):
            checkpoint.write_card(extract(self, name), folder)

    def _folders(self, directory: str | Path) -> Iterator[tuple[str, Path]]:
        """Each adapter's name, and the folder that it goes to."""
        _, state = adapted(self)
        for name in state.configs:
            at_top = len(state.configs) == 1 or name == "default"
            yield name, Path(directory) if at_top else Path(directory) / name

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the model's own, where no adapter changes the tables; new rows are saved with the adapters.

        Args:
            new_num_tokens: as transformers has it.
            pad_to_multiple_of: likewise.
            args: likewise.
            kwargs: likewise.

        Raises:
            StateError: an adapter changes one of the tables.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return super().resize_token_embeddings(*args, **kwargs)  # pyright: ignore
        with resized(self, adapted(self)[1]):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)  # pyright: ignore


@contextmanager
def _repeating(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Tell a mixture how often `generate` repeats each row, for beams or several answers."""
    _, state = adapted(model)
    rows = state.rows
    if rows is None:
        yield
        return
    given = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_beams")), None)
    sources = [kwargs, *(vars(config) for config in (given, model.generation_config) if config is not None)]
    times = [_setting(sources, name) for name in ("num_beams", "num_return_sequences")]
    rows.axes.expansion = max(times)
    try:
        yield
    finally:
        rows.axes.expansion = 1


def _setting(sources: Iterable[Mapping[str, Any]], name: str) -> int:
    """The first of some settings that says how many, or one."""
    return next((found for source in sources if (found := source.get(name)) is not None), 1)


def enter(root: nn.Module) -> None:
    """Swap the root's class, if it is a transformers model."""
    root.__dict__.pop(_SAVE, None)
    modeling = sys.modules.get("transformers.modeling_utils")
    if (
        modeling is not None
        and isinstance(root, modeling.PreTrainedModel)
        and not isinstance(root, Pretrained)
    ):
        Pretrained.swap(root)
        trainers.tell()
        root.register_forward_pre_hook(trainers.check_head, with_kwargs=True)
    for path, part in _models_inside(root):
        vars(part)[_RESIZE] = functools.partial(resize_part, part, path, adapted(root)[1])


def keep_apart(root: nn.Module) -> None:
    """Have a merged model refuse to be saved beside an adapter, until `enter`; its class stays its own."""
    if hasattr(root, _SAVE):
        root.__dict__[_SAVE] = functools.partial(_save_apart, root)


def _save_apart(root: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model's own `save_pretrained`, into a folder without an adapter.

    Raises:
        FileError: there is one.
    """
    folder = next((each for each in (*args, *kwargs.values()) if isinstance(each, str | os.PathLike)), None)
    if folder is not None and (Path(folder) / CONFIG_FILE).is_file():
        raise FileError(
            f"{folder} holds an adapter ({CONFIG_FILE}). Who loads a model from there gets that adapter on "
            "top of the weights, and these are merged: it would count twice. Save into another folder, or "
            "remove the adapter's files first"
        )
    _, state = find_adapted(root) or (root, AdapterState())
    aside = state.aside
    if aside is None or not aside.shown:
        return getattr(type(root), _SAVE)(root, *args, **kwargs)
    aside.hide()
    try:
        return getattr(type(root), _SAVE)(root, *args, **kwargs)
    finally:
        aside.show()


def leave(root: nn.Module) -> None:
    """Give the root its own class back, or that of what else it hosts."""
    if isinstance(root, Pretrained):
        # Not `root.leave()`: what it would take off is that other host's.
        root.__class__ = root.base_class  # pyright: ignore[reportAttributeAccessIssue]
        for key in [key for key, hook in root._forward_pre_hooks.items() if hook is trainers.check_head]:
            del root._forward_pre_hooks[key], root._forward_pre_hooks_with_kwargs[key]
    if STATE in vars(root):
        for _, part in _models_inside(root):
            vars(part).pop(_RESIZE, None)


_RESIZE = "resize_token_embeddings"


def _models_inside(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that are models of transformers too, by their paths."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        for path, part, _ in walk(root):
            if path and isinstance(part, modeling.PreTrainedModel):
                yield path, part
