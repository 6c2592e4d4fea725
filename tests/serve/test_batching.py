"""What `lorica.serve.decoder.batching` relies on in transformers, a test for each hook.

If one fails after a new version of transformers, that file is to be looked at, and no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

from serving import decoder
from waiting import PATIENCE, until

from lorica.serve.decoder import attention
from lorica.serve.decoder.batching import Batcher, bytes_per_token, prompt_logits


class Greedy:
    """Chooses the most likely tokens, and writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.todo: list[Callable[[Batcher], object]] = []
        self.batches: list[tuple[list[tuple[str, int, bool]], list[str] | None]] = []
        self.tokens: dict[str, list[int]] = {}
        self.found: dict[str, int] = {}
        self.spaces: dict[str, Sequence[int]] = {}
        self.backwards = False
        self.over = threading.Event()
        self.error: BaseException | None = None

    def between(self, batcher: Batcher) -> bool:
        self.calls.append("between")
        while self.todo:
            self.todo.pop(0)(batcher)
        return False

    def order(self, id: str) -> Any:
        return [-ord(letter) for letter in id] if self.backwards else 0

    def packed(self, parts: Sequence[Any], heads: Sequence[str] | None) -> None:
        self.calls.append("packed")
        self.batches.append(([tuple(part) for part in parts], None if heads is None else list(heads)))

    def choose(self, ids: Sequence[str], logits: torch.Tensor) -> torch.Tensor:
        self.calls.append("choose")
        chosen = logits.argmax(-1)
        for id, token in zip(ids, chosen.tolist(), strict=True):
            self.tokens.setdefault(id, []).append(token)
        return chosen

    def stepped(self) -> None:
        self.calls.append("stepped")

    def namespace(self, id: str) -> Sequence[int]:
        return self.spaces.get(id, (1, 2, 3, 4))

    def matched(self, id: str, tokens: int) -> None:
        self.found[id] = tokens

    def ended(self, error: BaseException | None) -> None:
        self.error = error
        self.over.set()


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder()


def batcher(model: Any, conductor: Greedy, **sizes: int) -> Batcher:
    made = Batcher(model, conductor, **{"page": 8, "blocks": 40, "tokens": 32, "requests": 4} | sizes)
    made.start()
    return made


def run(made: Batcher, conductor: Greedy, requests: dict[str, tuple[list[int], int]]) -> None:
    def put(own: Batcher) -> None:
        for id, (prompt, count) in requests.items():
            own.put(id, prompt, count, ())

    conductor.todo.append(put)
    made.wake()
    until(lambda: all(len(conductor.tokens.get(id, ())) == count for id, (_, count) in requests.items()))
    until(lambda: made.blocks_held == 0)


def test_a_step_asks_in_order_and_tells_what_is_in_the_batch(model: Any):
    conductor = Greedy()
    made = batcher(model, conductor)
    run(made, conductor, {"long": ([5] * 40, 2), "short": ([7, 8, 9], 3)})
    made.stop(hard_stop=True)
    assert conductor.over.wait(PATIENCE)
    assert conductor.error is None
    # A prompt longer than a step takes two, and has no token after the first; the head is given as many
    # entries as there are requests, padded with the first token.
    assert conductor.batches[0] == ([("long", 32, False)], ["long"])
    parts, heads = conductor.batches[1]
    assert parts == [("long", 8, True), ("short", 3, True)]
    assert heads == ["long", "short"]
    steps = [call for call in conductor.calls if call != "between"]
    assert steps[:5] == ["packed", "stepped", "packed", "choose", "stepped"]
    assert conductor.calls[0] == "between"
    out = made.output_router.output_queue
    assert out.empty()  # nothing is kept for readers that there are none of


@pytest.mark.parametrize("backwards", [False, True])
def test_tokens_are_the_model_s_own_in_any_order(model: Any, backwards: bool):
    conductor = Greedy()
    conductor.backwards = backwards
    made = batcher(model, conductor)
    prompts = {str(i): ([3 + i, *range(4, 4 + 5 * i)], 6) for i in range(5)}
    run(made, conductor, prompts)
    made.stop(hard_stop=True)
    for parts, _ in conductor.batches:
        ids = [id for id, *_ in parts]
        assert not backwards or ids == sorted(ids, reverse=True)
    for id, (prompt, _) in prompts.items():
        got = conductor.tokens[id]
        with torch.no_grad():
            likeliest = model(torch.tensor([prompt + got])).logits[0].argmax(-1)[len(prompt) - 1 : -1]
        assert likeliest.tolist() == got


@pytest.mark.parametrize(("other", "found"), [((1, 2, 3, 4), 32), ((1, 2, 3, 5), None)])
def test_a_prefix_is_found_in_its_namespace_alone(model: Any, other: tuple[int, ...], found: int | None):
    conductor = Greedy()
    conductor.spaces["second"] = other
    made = batcher(model, conductor)
    assert made.shares_prefixes
    run(made, conductor, {"first": (list(range(3, 39)), 2)})
    run(made, conductor, {"second": (list(range(3, 39)), 2)})
    made.stop(hard_stop=True)
    assert conductor.found.get("second") == found
    assert conductor.tokens["first"] == conductor.tokens["second"]


def test_cancelling_frees_blocks_and_lets_others_in(model: Any):
    conductor = Greedy()
    made = batcher(model, conductor, blocks=12)
    conductor.todo.append(lambda own: own.put("a", [3, 4, 5], 90, ()))
    made.wake()
    until(lambda: len(conductor.tokens.get("a", ())) > 2)

    def cancel(own: Batcher) -> None:
        # As it stands after a request had to give way: no new ones until one finishes.
        own._processor.scheduler.block_new_requests = True
        own.cancel(["a", "never heard of"])

    conductor.todo.append(cancel)
    made.wake()
    until(lambda: made.blocks_held == 0)
    run(made, conductor, {"b": ([6, 7], 3)})
    made.stop(hard_stop=True)


def test_a_request_that_gives_way_goes_on_under_its_name(model: Any):
    """The cache is too small for all; some are set back, and computed anew with what they had."""
    conductor = Greedy()
    made = batcher(model, conductor, blocks=14)
    requests = {str(i): ([3 + i] * 10, 40) for i in range(4)}
    run(made, conductor, requests)
    made.stop(hard_stop=True)
    for id, (prompt, _) in requests.items():
        with torch.no_grad():
            likeliest = model(torch.tensor([prompt + conductor.tokens[id]])).logits[0].argmax(-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == conductor.tokens[id]
    assert sum(tokens > 10 for parts, _ in conductor.batches for _, tokens, _ in parts)


def test_an_error_in_a_step_ends_the_thread_and_is_told(model: Any):
    conductor = Greedy()

    def fail(*_: object) -> None:
        raise ValueError("told")

    conductor.packed = fail  # type: ignore[method-assign]
    made = batcher(model, conductor)
    conductor.todo.append(lambda own: own.put("a", [3], 2, ()))
    made.wake()
    assert conductor.over.wait(PATIENCE)
    assert str(conductor.error) == "told"
    until(lambda: not made.is_running())
    made.stop(hard_stop=True)


def test_its_thread_does_not_keep_a_process_from_ending(model: Any):
    made = batcher(model, Greedy())
    assert made._generation_thread.daemon
    made.stop(hard_stop=True)


def test_attention_goes_by_request_while_an_engine_runs(model: Any):
    first, second = batcher(model, Greedy()), batcher(model, Greedy())
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        inside = model(ids).logits
    assert model.config._attn_implementation == attention.NAME
    first.stop(hard_stop=True)
    assert model.config._attn_implementation == attention.NAME
    second.stop(hard_stop=True)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, inside)


def test_one_that_has_only_begun_ends_without_a_word(model: Any, caplog: pytest.LogCaptureFixture):
    log = logging.getLogger("ContinuousBatchingLogger")
    log.addHandler(caplog.handler)
    try:
        batcher(model, Greedy()).stop(hard_stop=True)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records


def test_prompts_are_scored_in_pieces_as_in_one(model: Any):
    prompt = list(range(3, 40))
    with torch.no_grad():
        whole = model(torch.tensor([prompt])).logits[0]
    pieces = torch.cat(list(prompt_logits(model, prompt, 7)))
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)


def test_the_cache_takes_what_is_reckoned(model: Any):
    made = batcher(model, Greedy(), blocks=40)
    until(lambda: made.batch_processor is not None)
    processor: Any = made.batch_processor
    tensor = processor.cache.cache_tensor
    assert 40 <= tensor.nbytes / (8 * bytes_per_token(model)) <= 42  # and two that nobody is given
    made.stop(hard_stop=True)
