"""Whether a model keeps sequences apart that go through it abreast: it is asked once, with random tokens.

Asked for the log-probabilities, the gradients and the samples of sequences with different adapters, together
and alone, and whether tokens behind a sequence, which fill it up, change anything before them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapter import Adapter, Factors
from lorica.config import LoraConfig
from lorica.service.engine.base import Base
from lorica.service.engine.datum import Datum
from lorica.service.engine.drawing import Draw, Request, Writer, advance
from lorica.service.engine.losses import LOSSES
from lorica.service.engine.training import Task, learn
from lorica.service.engine.weights import Learner

_ASKED: dict[tuple[Any, ...], bool] = {}


def prove(base: Base) -> None:
    """Let sequences of a model go abreast if that changes nothing."""
    wide = base.abreast
    config: Any = getattr(base.model, "config", None)
    weight = next(base.model.parameters())
    made_of = frozenset(type(module) for module in base.model.modules())
    key = (made_of, str(config), weight.dtype, weight.device.type, torch.get_num_threads())
    if key not in _ASKED:
        small = wide.fill <= 64 and 4 * wide.fill <= base.context
        _ASKED[key] = bool(small and _holds(base))
    wide.proven = _ASKED[key]


def _holds(base: Base) -> bool:
    base.abreast.proven = True
    random = torch.Generator().manual_seed(0)
    n = 2 * base.abreast.fill
    rows = torch.randint(0, base.vocabulary, (5, n + 1), generator=random)
    try:
        learners = [Learner(_drawn(base, random), base.model) for _ in range(2)]
        return _looks_back(base, rows) and _learns(base, learners, rows) and _writes(base, learners, rows)
    except Exception:  # whatever such a model does not take, it need not
        return False
    finally:
        base.abreast.proven = False


def _drawn(base: Base, random: torch.Generator) -> Adapter:
    factors = {}
    for path in (*base.targets.attn, *base.targets.mlp, *base.targets.unembed):
        module = base.model.get_submodule(path)
        assert isinstance(module.weight, Tensor)
        d_out, d_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        A, B = (torch.randn(shape, generator=random) for shape in ((2, d_in), (d_out, 2)))
        factors[path] = Factors(A * d_in**-0.5, B * 0.1, 1.0)
    return Adapter(LoraConfig(r=2, lora_alpha=2, target_modules=sorted(factors)), factors)


def _looks_back(base: Base, rows: Tensor) -> bool:
    n = rows.shape[1] - 3
    found = []
    for last in (0, 1):
        filled = rows[:1].clone()
        filled[:, n:] = last
        with base.running(backward=False):
            found.append(base.read(filled).hidden[:, :n])
    return torch.equal(*found)


def _learns(base: Base, learners: list[Learner], rows: Tensor) -> bool:
    own = [0, 1, 1, 0, 1]

    def tasks() -> list[Task]:
        made = []
        for i, row in enumerate(rows):
            tokens = row[: len(row) - 3] if i == 2 else row
            datum = Datum.of(tokens[:-1], target_tokens=tokens[1:])
            loss = LOSSES["cross_entropy"]
            limits = {"context": base.context, "vocabulary": base.vocabulary}
            ready = datum.ready(loss, "cross_entropy", **limits)
            made.append(Task(ready, loss, {}, learners[own[i]]))
        return made

    def told(passes: list[list[Task]]) -> list[Tensor]:
        for learner in learners:
            learner.gradient.zero_()
        for each in passes:
            learn(base, each, backward=True)
        found = [task.logprobs for each in passes for task in each]
        return [*found, *(learner.gradient.clone() for learner in learners)]

    return _same(told([tasks()]), told([[task] for task in tasks()]))


def _writes(base: Base, learners: list[Learner], rows: Tensor) -> bool:
    n = base.abreast.fill
    draw = Draw(max_tokens=4, seed=1, num_samples=2, stop=(), topk_prompt=2, prompt_logprobs=True)

    def requests() -> list[Request]:
        given = zip(rows.tolist(), (0, 1, 1), strict=False)
        made = [Request(base, row[:n], dataclasses.replace(draw, max_tokens=3 + i)) for row, i in given]
        for request, i in zip(made, (0, 1, 1), strict=True):
            request.weights = learners[i]
        return made

    def told(groups: list[list[Request]]) -> list[Tensor]:
        found = []
        for group in groups:
            writers = [Writer(base, group)]
            while writers:
                advance(base, writers)
                for writer in writers:
                    if writer.error is not None:
                        raise writer.error
                writers = [w for old in writers for w in (old, *old.taken()) if not w.done]
            for request in group:
                for sample in request.samples.sequences:
                    found += [torch.tensor(sample.tokens), torch.tensor(sample.logprobs)]
        return found

    return _same(told([requests()]), told([[request] for request in requests()]))


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
