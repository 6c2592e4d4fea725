"""Text from tokens as they come, and the choice of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import Letters

from lorica.serve import Sampling
from lorica.serve.decoder.sampling import Sampler, choose_all
from lorica.serve.decoder.text import Writer

tokens = st.lists(st.integers(0, 39), max_size=24)


@given(tokens, st.lists(st.text("3456789", min_size=1, max_size=3), max_size=3))
def test_what_was_written_is_the_text_up_to_the_first_stop(ids: list[int], stops: list[str]):
    writer = Writer(Letters(), stops)
    parts = [writer.write([id]) for id in ids]
    parts.append(writer.finish())
    whole = Letters().decode(ids)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert "".join(parts) == whole[: min(ends, default=len(whole))]
    assert writer.stopped == bool(ends)


def test_half_a_character_and_the_start_of_a_stop_text_are_held_back():
    writer = Writer(Letters(), ["56"])
    assert [writer.write([id]) for id in (4, 9, 10, 5, 7, 5, 6, 8)] == ["4", "", "é", "", "57", "", "", ""]
    assert writer.stopped
    assert Writer(None).write([1, 2]) == ""


def draw(logits: torch.Tensor, times: int = 400, **fields: Any) -> list[int]:
    sampler = Sampler(Sampling(seed=1, **fields), [0])
    return [sampler.choose(logits).id for _ in range(times)]


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),  # 0.64, 0.87, 0.96, ...
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.1}, {0, 1, 2}),
        ({"logit_bias": ((0, -100.0), (1, -100.0))}, {2, 3, 4}),
        ({"temperature": 0.01}, {0}),
        ({"temperature": 0}, {0}),
        ({"temperature": 0, "logit_bias": ((3, 9.0),)}, {3}),
    ],
)
def test_draws_keep_to_the_rules(fields: dict[str, Any], allowed: set[int]):
    assert set(draw(LOGITS, **fields)) <= allowed


def test_draws_have_the_probabilities_of_the_model():
    counts = torch.bincount(torch.tensor(draw(LOGITS, 4000)), minlength=5) / 4000
    assert (counts - LOGITS.softmax(0)).abs().max() < 0.03


def test_penalties_count_what_came_before():
    assert draw(LOGITS, 3, temperature=0, presence_penalty=1.5) == [0, 1, 0]
    assert draw(LOGITS, 4, temperature=0, frequency_penalty=0.9) == [0, 0, 1, 0]
    # The prompt has the first token: its logit is 2 / 3 from the beginning.
    assert draw(LOGITS, 2, temperature=0, repetition_penalty=3.0) == [1, 0]


def test_plain_requests_and_others_share_a_step():
    greedy, drawn = Sampling(temperature=0), Sampling(temperature=0, logprobs=2)
    logits = torch.randn(3, 7)
    chosen: list[Any] = choose_all([Sampler(own, []) for own in (greedy, drawn, greedy)], logits)
    first, second, third = chosen
    assert [first.id, second.id, third.id] == logits.argmax(-1).tolist()
    logs = logits[1].log_softmax(0)
    assert second.logprob == pytest.approx(float(logs.max()))
    assert [id for id, _ in second.top] == logs.topk(2).indices.tolist()
    assert first.logprob is None
