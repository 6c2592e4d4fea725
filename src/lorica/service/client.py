"""The verbs of the service in one process, without a server: for loops that hold their own model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.service import files
from lorica.service.engine.base import Base
from lorica.service.engine.datum import Datum
from lorica.service.engine.drawing import Draw, Samples
from lorica.service.engine.engine import Output
from lorica.service.engine.several.engines import Engines
from lorica.service.engine.weights import Adam, Learner, Make, start
from lorica.service.errors import UserError


class Client:
    """Trains and samples from many adapters on one frozen base.

    Calls return futures at once; those of one `Training` happen in order, and those of several share passes
    over the base. What each gets does not depend on the others, to the last bit on a CPU.

    Args:
        model: a causal model of transformers. It is put in evaluation and frozen, and not changed otherwise.
        tokenizer: for texts that end a sample.
        name: of the base, as adapters' files give it; None takes its ``name_or_path``.
        tokens: of one pass, over all sequences.
        lanes: samples that are written at once.
        engines: passes at once. From 2 on each is a process, forked here, and torch's threads are divided
            among them, in the whole process, until `close`.

    Raises:
        UserError: it is no causal model, carries adapters, or is quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        tokens: int = 2048,
        lanes: int = 128,
        engines: int = 1,
    ) -> None:
        """Start the engines."""
        name = str(getattr(model, "name_or_path", "")) if name is None else name
        self.base = Base(model, name, tokenizer)
        self.engine = Engines(self.base, engines, tokens=tokens, lanes=lanes)
        self._made = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; futures that wait raise `ServiceDown`."""
        self.engine.stop()

    def create(
        self,
        rank: int = 32,
        *,
        seed: int | None = None,
        train_unembed: bool = True,
        train_mlp: bool = True,
        train_attn: bool = True,
    ) -> Training:
        """A new adapter to train: A drawn, B zero, α = 32.

        Args:
            rank: of each update.
            seed: of A's start; None draws one.
            train_unembed: adapt the output head.
            train_mlp: adapt the blocks' other linear layers.
            train_attn: adapt those of attention.

        Raises:
            UserError: no layer is left to adapt.
        """
        make = Make(
            rank=rank, seed=seed, train_unembed=train_unembed, train_mlp=train_mlp, train_attn=train_attn
        )
        adapter = start(self.base.model, make, self.base.targets, name=self.base.name or None)
        return self._training(Learner(adapter, self.base.model))

    def load(self, folder: str | Path, *, optimizer: bool = True) -> Training:
        """Go on with an adapter that `Training.save` wrote, or with any LoRA adapter of the base.

        Args:
            folder: with PEFT's files.
            optimizer: go on with the optimizer as well.

        Raises:
            FileError: there is none, or it lacks the optimizer.
            UserError: it does not fit the base, or is more than LoRA of linear layers.
        """
        adapter, moments = files.read(Path(folder), optimizer=optimizer)
        learner = Learner(adapter, self.base.model)
        learner.take(adapter, moments)
        return self._training(learner)

    def sample(self, prompt: Sequence[int], **draw: Any) -> Future[Samples]:
        """Samples from the base; `draw` as in `Draw`."""
        return self.engine.sample(_tokens(prompt), lambda: None, _draw(draw))

    def _training(self, learner: Learner) -> Training:
        self._made += 1
        return Training(self, f"{self._made}", learner)


class Training:
    """One adapter in training; `Client.create` makes it."""

    def __init__(self, client: Client, run: str, learner: Learner) -> None:
        """Hold the adapter."""
        self._client, self._run, self._learner = client, run, learner

    def forward_backward(
        self, data: Iterable[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[Output]:
        """Add the gradient of a loss, a sum over all tokens, to that of the next `optim_step`.

        Args:
            data: sequences, with the loss's inputs (`Datum.of`).
            loss_fn: ``"cross_entropy"``, ``"importance_sampling"``, ``"ppo"``, ``"cispo"`` or ``"dro"``.
            loss_fn_config: settings of the loss.

        Raises:
            UserError: the data or the loss cannot be used.
        """
        return self._learn(data, loss_fn, loss_fn_config, backward=True)

    def forward(
        self, data: Iterable[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[Output]:
        """As `forward_backward`, without a gradient."""
        return self._learn(data, loss_fn, loss_fn_config, backward=False)

    def _learn(
        self, data: Iterable[Datum], loss_fn: str, config: Mapping[str, float] | None, *, backward: bool
    ) -> Future[Output]:
        data = [data] if isinstance(data, Datum) else list(data)
        for datum in data:
            if not isinstance(datum, Datum):
                raise UserError(f"data are Datum.of(...), not {type(datum).__name__}")
        return self._client.engine.learn(
            self._run,
            data,
            loss_fn,
            dict(config or {}),
            lambda: self._learner,
            backward=backward,
            tenant=self._run,
        )

    def optim_step(self, adam: Adam | None = None, **settings: Any) -> Future[dict[str, float]]:
        """Take one step of AdamW; the gradient is zero then.

        Args:
            adam: its settings; None takes `settings`, by the names of `Adam`.
            settings: such as ``learning_rate``.

        Returns:
            ``grad_norm``, before clipping.
        """
        step = Adam(**settings) if adam is None else adam
        return self._call(lambda: self._learner.step(step))

    def sample(self, prompt: Sequence[int], **draw: Any) -> Future[Samples]:
        """Samples from the adapter as it is after the calls before; `draw` as in `Draw`."""
        tokens, settings = _tokens(prompt), _draw(draw)
        frozen = self._call(self._learner.frozen)
        return self._client.engine.sample(tokens, frozen.result, settings, after=frozen)

    def save(self, folder: str | Path, *, optimizer: bool = True) -> Future[Path]:
        """Write PEFT's files, and the optimizer beside them."""
        return self._call(lambda: files.write(self._learner, Path(folder), optimizer=optimizer))

    def adapter(self) -> Future[Adapter]:
        """The adapter as a value, as it is after the calls before."""
        return self._call(lambda: self._learner.copied().adapter())

    def gradient(self) -> Future[dict[str, tuple[Tensor, Tensor]]]:
        """Module path → gradients of A and B that the next `optim_step` would use."""

        def copied() -> dict[str, tuple[Tensor, Tensor]]:
            held = self._learner.paths.items()
            return {path: (f.dA.clone(), f.dB.clone()) for path, f in held}  # type: ignore[union-attr]

        return self._call(copied)

    def _call(self, work: Any) -> Future[Any]:
        return self._client.engine.call(self._run, work, tenant=self._run)


def _tokens(prompt: Sequence[int]) -> list[int]:
    """Token ids, of a list or a tensor."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise UserError("a prompt is a sequence of token ids, which are whole numbers") from None


def _draw(settings: Mapping[str, Any]) -> Draw:
    chosen: dict[str, Any] = dict(settings)
    stop = chosen.get("stop")
    if stop is not None:
        chosen["stop"] = (stop,) if isinstance(stop, str | int) else tuple(stop)
    return Draw(**chosen)
