"""Facts of a model with adapters that the trainers of transformers and TRL cannot know.

They ask `isinstance(model, peft.PeftModel)`, and take any other model for one whose own weights train. Some
of their functions are therefore wrapped, once, for the models of this library alone:

    Trainer._load_from_checkpoint, Trainer._load_best_model   each trained adapter is read back
    create_model_from_path, in TRL                            the adapter's start, in place of a second base
    disable_dropout_in_model, in TRL                          the adapters' dropout too
    get_peft_model, in TRL                                    see `configurations`

One of their losses is refused (`check_head`).

Nothing is imported here. `tell` wraps what is loaded, when a model gets its first adapter and again when a
trainer is made around it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorica.errors import LoricaError, StateError
from lorica.layers import LoraLayer, SavedModule, TrainedTokens
from lorica.model.pretrained import configurations
from lorica.model.pretrained.reference import Reference
from lorica.model.pretrained.resuming import restore_trained
from lorica.state import find_adapted

_KNOWS = "knows_lorica"


def tell() -> None:
    """Wrap those of the functions that are loaded and are not wrapped yet."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None:
        return
    _wrap(trainer, "_load_from_checkpoint", _loading)
    _wrap(trainer, "_load_best_model", _ending)
    trl = [module for name, module in sys.modules.items() if name.startswith("trl.")]
    for module in trl:
        _wrap(module, "create_model_from_path", _creating)
        _wrap(module, "disable_dropout_in_model", _disabling)
    if trl:
        configurations.exchange()


def takes_back(trainer: Any, checkpoint: str | None, model: Any = None) -> bool:
    """Have a trainer's model take a checkpoint's adapters back.

    Args:
        trainer: transformers' Trainer, or one of its kind.
        checkpoint: folder that it wrote.
        model: the model, where it is not the trainer's.

    Returns:
        Whether that was done. Models without adapters, FSDP and DeepSpeed take the trainer's own ways.
    """
    if checkpoint is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    return restore_trained(trainer.model if model is None else model, checkpoint)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    theirs = getattr(owner, "__dict__", {}).get(name)
    if callable(theirs) and not getattr(theirs, _KNOWS, False):
        ours = functools.wraps(theirs)(wrapper(theirs))
        setattr(ours, _KNOWS, True)
        setattr(owner, name, ours)


def _loading(theirs: Any) -> Any:
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not takes_back(self, resume_from_checkpoint, model):
            theirs(self, resume_from_checkpoint, model)

    return load_from_checkpoint


def _ending(theirs: Any) -> Any:
    def load_best_model(self: Any) -> None:
        if not takes_back(self, self.state.best_model_checkpoint):
            theirs(self)

    return load_best_model


def _creating(theirs: Any) -> Any:
    def create_model_from_path(model_id: Any, *args: Any, **options: Any) -> Any:
        # The trainer that asks; it names the path of its own model where it wants a reference or a teacher.
        trainer = sys._getframe(1).f_locals.get("self")
        model = getattr(trainer, "model", None)
        own = getattr(getattr(model, "config", None), "_name_or_path", None)
        found = find_adapted(model) if isinstance(model, nn.Module) and own == model_id else None
        if trainer is None or found is None:
            return theirs(model_id, *args, **options)
        _check(trainer)
        return Reference(found[0])

    return create_model_from_path


def _check(trainer: Any) -> None:
    """Refuse what a reference that shares its weights with the model cannot do.

    Raises:
        LoricaError: naming it.
    """
    kind, args = type(trainer).__name__, trainer.args
    if getattr(args, "sync_ref_model", False) or getattr(args, "teacher_model_kind", None) == "ema":
        raise LoricaError(
            f"{kind} would move the reference model's weights after the model's, but the reference of an "
            "adapted model is its adapter's start, on the same base; leave out sync_ref_model (or "
            "teacher_model_kind='ema'), or pass a ref_model of your own"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise LoricaError(
            f"{kind} under FSDP or DeepSpeed needs a reference model with weights of its own; pass as "
            "ref_model the base with the adapter that training starts from"
        )


def _disabling(theirs: Any) -> Any:
    def disable_dropout_in_model(model: nn.Module) -> None:
        theirs(model)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.update(dict.fromkeys(module.lora_dropout, 0.0))

    return disable_dropout_in_model


def check_head(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a loss that multiplies by the head's raw weight while the head carries an update.

    TRL's trainers and Liger's kernels do so to spare the logits; the update would neither act nor train. A
    head trained whole shows them its copy's weight, but not one per row. A hook on a model that carries
    adapters, before each call.

    Args:
        model: the model.
        args: what its forward is about to be called with.
        kwargs: likewise, by name.

    Raises:
        StateError: naming the head.
    """
    if torch.compiler.is_compiling():
        return
    fused = kwargs.get("fused_lm_head") or type(model).forward.__module__.startswith("liger_kernel")
    if not fused:
        return
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, LoraLayer | SavedModule | TrainedTokens):
        return
    if head.adapter_state.rows is not None or (isinstance(head, LoraLayer) and head.acting()):
        path = next(path for path, module in model.named_modules() if module is head)
        raise StateError(
            f"{path} carries an adapter, but this trainer's fused loss reads {path}.weight without calling "
            f"the layer, so the adapter would be neither used nor trained; leave {path!r} out of "
            "target_modules, train it whole by modules_to_save, or use a trainer that computes the logits "
            "(transformers' own)"
        )
