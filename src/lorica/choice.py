"""The choice of acting adapters: for the model, and for a thread or task that chose for itself.

    model's own choice      of all that have not chosen; made in the thread that adapted the model
    with lorica.active(...) of this thread or task alone (contextvars)
    a block computed anew   what acted when it was computed first (gradient checkpointing)

Parameters that stand in the base's place while their adapter acts (trained biases, what a start left of W0)
are one for all. So a choice that would exchange them is refused in other threads, and while others are inside
a block of theirs.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import unwrap
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointFunction

from lorica.errors import AdapterError, StateError, listing

_LOCK = threading.Lock()


def names_in(given: Any) -> tuple[Any, ...]:
    """Adapters' names as they were given: one, or several.

    Raises:
        AdapterError: it is neither.
    """
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Iterable):
        return tuple(given)
    raise AdapterError(f"an adapter's name is due, or a list of names, not {given!r:.80}")


class Choice(NamedTuple):
    """A choice of adapters.

    Args:
        names: adapters whose updates add up.
        rows: which acts on which row of the batch, in place of `names`.
        placed: adapters whose parameters stood in the base's place when it was made.
        resting: names of the adapters that are disabled, and act again once they are enabled; None where none
            are.
    """

    names: tuple[str, ...] = ()
    rows: Any = None
    placed: tuple[str, ...] = ()
    resting: tuple[str, ...] | None = None


_OWN: ContextVar[Mapping[object, Choice]] = ContextVar("lorica_choices")


@dataclass(eq=False)
class Choices:
    """The choices on one model, seen from the thread or task that asks.

    Args:
        shared: the choice of the model itself.
        owners: how many threads and tasks made choices of their own, or more; while there is none, nothing
            is looked up.
        placed: adapters whose parameters stand in the base's place.
        inside: open blocks → the thread and task that each was entered in.
        key: under which a context keeps its own choice.
        merged: names of the adapters that are merged into the weights at the moment, for all.
    """

    shared: Choice = field(default_factory=Choice)
    owners: int = 0
    placed: tuple[str, ...] = ()
    inside: dict[int, tuple[int, int]] = field(default_factory=dict)
    key: object = field(default_factory=object)
    merged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._home = weakref.ref(threading.current_thread())

    def __getstate__(self) -> dict[str, Any]:
        """A copy is at home where it is made, and nobody has chosen on it."""
        state = {name: value for name, value in vars(self).items() if name != "_home"}
        return state | {"owners": 0, "inside": {}, "key": object(), "shared": self.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As `__getstate__`."""
        vars(self).update(state)
        self._home = weakref.ref(threading.current_thread())

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act; their updates add up."""
        return self._now().names

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self.decide(self.last._replace(names=names))

    @property
    def rows(self) -> Any:
        """The adapter of each row of the batch, in place of `active`; None without a mixture."""
        return self._now().rows

    @property
    def resting(self) -> tuple[str, ...] | None:
        """Names of the adapters that are disabled, and act again once they are enabled."""
        return self.last.resting

    @resting.setter
    def resting(self, names: tuple[str, ...] | None) -> None:
        self.decide(self.last._replace(resting=names))

    @property
    def choice(self) -> Choice:
        """The choice that holds here.

        Raises:
            StateError: another thread exchanged parameters of the base since this one chose.
        """
        own = self.own_choice()
        if own is None:
            if self.owners and torch._C._current_graph_task_id() != -1 and not self._is_home():
                raise StateError(
                    "a backward pass computes anew (gradient checkpointing) in a thread of autograd's own, "
                    "which does not know the adapters chosen for this one; train in the thread that adapted "
                    "the model"
                )
            return self.shared
        if own.placed != self.placed:
            raise StateError(
                f"the parameters of {listing(map(repr, self.placed)) or 'no adapter'} now stand in the "
                f"base's place, and when {listing(map(repr, own.names)) or 'none'} was chosen in this thread "
                f"or task, those of {listing(map(repr, own.placed)) or 'no adapter'} did; choose again"
            )
        return own

    def _now(self) -> Choice:
        """The choice that holds here; in a block that is computed anew, the one of its first pass."""
        # Without gradients nothing is computed anew, and inference feels every call.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call, anew = _checkpointed()
            if anew:
                seen = getattr(call, _SEEN, {}).get(self.key)
                if seen:
                    return self._as_seen(seen)
            elif call is not None:
                self._see(call)
        return self.choice if self.owners else self.shared

    def see(self) -> None:
        """Write down what acts, if this is the first pass of a reentrant checkpoint.

        Such a pass has no gradients, and nothing else tells it from inference: layers in training ask for it.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _REENTRANT:
            frame = frame.f_back
        if frame is not None:
            self._see(frame.f_locals["ctx"])

    def _see(self, call: Any) -> None:
        now = self.choice if self.owners else self.shared
        seen = call.__dict__.setdefault(_SEEN, {}).setdefault(self.key, [])
        if now not in seen:
            seen.append(now)

    def _as_seen(self, seen: list[Choice]) -> Choice:
        """The choice for a block that is computed anew, of whose first pass this was seen."""
        if len(seen) == 1 and seen[0].placed == self.placed:
            return seen[0]
        now = self.last  # the block itself chooses, or parameters were exchanged
        if now in seen and now.placed == self.placed:
            return now
        raise StateError(
            "a backward pass computes a block anew (gradient checkpointing) in which "
            f"{listing(repr(choice.names) for choice in seen)} acted, and now {now.names!r} does; call "
            "backward inside the `with lorica.active` block of the forward pass"
        )

    def own_choice(self) -> Choice | None:
        """This thread's or task's own choice."""
        return _OWN.get({}).get(self.key) if self.owners and not self.merged else None

    @property
    def last(self) -> Choice:
        """The last choice for here, whether it can still be made or not."""
        return self.own_choice() or self.shared

    def decide(self, choice: Choice, *, for_all: bool = False) -> None:
        """Make a choice: for this thread or task, and in the model's own thread for the model too.

        Args:
            choice: what is to act.
            for_all: for the model in any case.
        """
        home = self._is_home()
        if not home or in_task() or self.own_choice() is not None:
            self._keep(choice)
        if home or for_all:
            self.shared = choice

    @contextlib.contextmanager
    def only_here(self, choice: Choice) -> Iterator[None]:
        """Let something act for a while in this thread or task alone, wherever that is."""
        before = self.own_choice()
        self._keep(choice)
        try:
            yield
        finally:
            self._drop() if before is None else self._keep(before)

    def _keep(self, choice: Choice) -> None:
        kept = _OWN.get({})
        if self.key not in kept:
            with _LOCK:
                self.owners += 1
        _OWN.set({**kept, self.key: choice})

    def _drop(self) -> None:
        kept = dict(_OWN.get({}))
        if kept.pop(self.key, None) is not None:
            _OWN.set(kept)
            with _LOCK:
                self.owners -= 1

    def enter(self, block: object, before: Choice) -> None:
        """A block begins: what it chose is this task's own, if it is in one, and not the model's.

        Args:
            block: whose identity tells it from others.
            before: what the model's own choice was.
        """
        self.inside[id(block)] = here()
        if self.own_choice() is not None and before.placed == self.placed:
            self.shared = before

    def leave(self, block: object, own: Choice | None, shared: Choice, now: Choice) -> None:
        """A block ends, or a choice is taken back.

        Args:
            block: whose identity tells it from others.
            own: the choice of this thread or task before.
            shared: the model's own choice before.
            now: the model's own choice at the end of the block, which others may have made.
        """
        self.inside.pop(id(block), None)
        if own is None:
            self._drop()
        else:
            self._keep(own._replace(placed=self.placed) if own.placed != self.placed else own)
        if self._is_home():
            kept = in_task() and now.placed == self.placed
            self.shared = (now if kept else shared)._replace(placed=self.placed)

    def check_alone(self, doing: str) -> None:
        """Refuse what would change the model under a choice that others have made.

        Raises:
            StateError: another thread or task is inside a block.
        """
        if any(where != here() for where in list(self.inside.values())):
            raise StateError(
                f"cannot {doing} while another thread or task is inside `with lorica.active`, `disabled` or "
                "`mixed` of this model; wait until it has left"
            )

    def check_placing(self, names: tuple[str, ...]) -> None:
        """Refuse to exchange parameters of the base where others compute with the model.

        Raises:
            StateError: this is not the thread that adapted the model, or others are inside a block.
        """
        what = listing(map(repr, sorted({*names} ^ {*self.placed})))
        doing = f"choose, for parameters of {what} stand in the base's place, one for all threads"
        if not self._is_home():
            raise StateError(
                f"cannot {doing}; choose in the thread that adapted the model, or lorica.extract the adapter "
                "and attach that, if it is its start that stands there"
            )
        self.check_alone(doing)

    def _is_home(self) -> bool:
        """Whether this is the thread that adapted the model; once that has ended, the next that asks is."""
        home, this = self._home(), threading.current_thread()
        if home is None or not home.is_alive():
            self._home = weakref.ref(this)
            return True
        return home is this


def traced() -> bool:
    """Whether a compiler or a function transform looks on, which see tensor operations alone."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    )


# The hooks on what is kept for the backward pass; torch tells them from 2.8 on.
saving_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # type: ignore
_SEEN = "lorica_choices"
_REENTRANT = CheckpointFunction.forward.__code__


def _checkpointed() -> tuple[Any, bool]:
    """The checkpointed call of torch's that runs here, and whether it runs anew; None where none does.

    Each such call has an object that lives from its first pass to its last: torch's frame, which its hooks on
    saved tensors hold, or, for the reentrant kind, the node of the graph.
    """
    hooks = saving_hooks(True)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        pack = unwrap(hooks[0])
        held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        if "frame" in held:
            return held["frame"].cell_contents, False
        if "target_frame_ref" in held:
            return held["target_frame_ref"].cell_contents(), True
    if torch._C._current_graph_task_id() != -1:
        return torch._C._current_autograd_node(), True
    return None, False


def in_task() -> bool:
    """Whether a task of asyncio is running here."""
    return here()[1] != 0


def here() -> tuple[int, int]:
    """The identity of this thread and task."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), 0 if task is None else id(task)
