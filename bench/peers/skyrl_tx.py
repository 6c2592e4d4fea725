"""SkyRL tx as a contestant of `service.py`: its JAX backend without HTTP, in an environment of its own.

Reads a work a line, does it for every tenant, and says so. It is run by the Python of that environment, and
knows nothing of lorica.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import sys
from typing import Any


def main() -> None:
    """Begin as the first argument, a JSON object, says; then a work a line until the input ends."""
    asked = json.loads(sys.argv[1])
    said, sys.stdout = sys.stdout, sys.stderr  # the backend's own words are no answers
    peer = Peer(asked)
    versions = {name: importlib.metadata.version(name) for name in ("skyrl-tx", "jax")}
    print(json.dumps(versions), file=said, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        peer.do(**work)
        print(json.dumps("done"), file=said, flush=True)


class Peer:
    """The backend, and a model for each tenant.

    Args:
        asked: ``model`` (folder), ``tenants``, ``rank``, ``samples``, ``prompt``, ``drawn``.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        """Load the model, and start an adapter for each tenant."""
        self._types, self._engine = (
            importlib.import_module(f"tx.tinker.{name}") for name in ("types", "engine")
        )
        backend = importlib.import_module("tx.tinker.backends.jax")
        # Slot 0 is the base's.
        slots = {"max_lora_adapters": asked["tenants"] + 1, "max_lora_rank": asked["rank"]}
        self._backend = backend.JaxBackend(asked["model"], backend.JaxBackendConfig(**slots))
        self._asked, self._names = asked, [f"tenant{i}" for i in range(asked["tenants"])]
        for i, name in enumerate(self._names):
            self._backend.create_model(name, self._types.LoraConfig(rank=asked["rank"], alpha=32, seed=i))
            self._backend.models[name].loaded_checkpoint_id = "now"  # samples come from the weights in memory
        self._numbers = itertools.count()

    def do(self, rows: list[list[list[int]]], *, sampling: bool) -> None:
        """A step of every tenant on its rows, where there are any; and its samples."""
        types = self._types
        if rows:
            asked = {str(i): (name, self._learn(rows[i])) for i, name in enumerate(self._names)}
            self._backend.forward_backward(self._engine.prepare_model_pass_batch(asked))
            adam = types.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)
            for name in self._names:
                self._backend.optim_step(name, types.OptimStepInput(adam_params=adam))
        if sampling:
            asked = {str(i): (name, self._draw()) for i, name in enumerate(self._names)}
            self._backend.sample(self._engine.prepare_sample_batch(asked))

    def _learn(self, rows: list[list[int]]) -> Any:
        types = self._types
        data = [
            types.Datum(
                model_input=types.ModelInput(chunks=[types.ModelInputChunk(tokens=row[:-1])]),
                loss_fn_inputs=types.LossFnInputs(
                    target_tokens=types.TensorData(data=row[1:]),
                    weights=types.TensorData(data=[1.0] * (len(row) - 1)),
                    advantages=types.TensorData(data=[]),
                    logprobs=types.TensorData(data=[]),
                ),
            )
            for row in rows
        ]
        return types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")

    def _draw(self) -> Any:
        types, asked = self._types, self._asked
        prompt = types.ModelInput(chunks=[types.ModelInputChunk(tokens=list(range(asked["prompt"])))])
        params = types.SamplingParams(temperature=1.0, max_tokens=asked["drawn"], seed=next(self._numbers))
        return types.SampleInput(
            base_model=None,
            prompt=prompt,
            sampling_params=params,
            num_samples=asked["samples"],
            checkpoint_id="now",
            prompt_logprobs=False,
        )


if __name__ == "__main__":
    main()
