"""Requests refused at the door: those that would kill the engine, or fool the client.

A token id beyond the vocabulary, a prompt that the cache has no room for, an empty one: each ends the
engine's thread, or gives an answer from nothing. None gets past here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lorica.serve.engine import InvalidRequest, Limits, Sampling


def check(prompt: Sequence[int], sampling: Sampling, limits: Limits, *, writes: bool) -> None:
    """Refuse a request that cannot be answered.

    Args:
        prompt: token ids.
        sampling: how the answer is drawn.
        limits: of the engine.
        writes: whether it has a tokenizer, which stop texts need.

    Raises:
        InvalidRequest: naming what was expected and what came.
    """
    _check_ids("prompt", prompt, limits.vocabulary)
    if not prompt:
        raise InvalidRequest("the prompt is empty; an answer needs one token or more", param="prompt")
    _whole("max_tokens", sampling.max_tokens, 0, None)
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens=0 answers nothing, unless prompt_logprobs are asked for", param="max_tokens"
        )
    if len(prompt) + sampling.max_tokens > limits.context:
        raise InvalidRequest(
            f"the prompt has {len(prompt):,} tokens and max_tokens is {sampling.max_tokens:,}; together "
            f"they are at most {limits.context:,}",
            param="prompt" if len(prompt) >= limits.context else "max_tokens",
        )
    for name, low, high in _NUMBERS:
        _number(name, getattr(sampling, name), low, high)
    _whole("top_k", sampling.top_k, 0, None)
    if sampling.top_p == 0 or sampling.repetition_penalty == 0:
        name = "top_p" if sampling.top_p == 0 else "repetition_penalty"
        raise InvalidRequest(f"{name} should be above 0, not 0", param=name)
    if sampling.seed is not None:
        _whole("seed", sampling.seed, -(2**63), 2**64)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) is not None:
            _whole(name, getattr(sampling, name), 0, limits.logprobs)
    _check_stops(sampling, limits, writes=writes)
    for name, entries in (("logit_bias", sampling.logit_bias),):
        if len(entries) > limits.biases:
            raise InvalidRequest(
                f"{name} has {len(entries):,} entries; at most {limits.biases} are taken", param=name
            )
        _check_ids(name, [token for token, _ in entries], limits.vocabulary)
        for _, bias in entries:
            _number(name, bias, -1e6, 1e6)


_NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0, 1e6),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -1e3, 1e3),
    ("frequency_penalty", -1e3, 1e3),
    ("repetition_penalty", 0, 1e3),
)


def _check_stops(sampling: Sampling, limits: Limits, *, writes: bool) -> None:
    for name, stops in (("stop", sampling.stop), ("stop_token_ids", sampling.stop_token_ids)):
        if len(stops) > limits.stops:
            raise InvalidRequest(
                f"{name} has {len(stops):,} entries; at most {limits.stops} are taken", param=name
            )
    _check_ids("stop_token_ids", sampling.stop_token_ids, limits.vocabulary)
    for text in sampling.stop:
        if not isinstance(text, str) or not 0 < len(text) <= limits.stop_length:
            shown = repr(text)[:60]
            raise InvalidRequest(
                f"a stop text should have 1 to {limits.stop_length} characters, not {shown}", param="stop"
            )
    if sampling.stop and not writes:
        raise InvalidRequest("stop texts need a tokenizer, and the engine has none", param="stop")


def _check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    for id in _wrong(ids, vocabulary):
        raise InvalidRequest(
            f"{name} has the token id {str(id)[:40]}; they are whole numbers from 0 to {vocabulary - 1:,}",
            param=name,
        )


def _wrong(ids: Sequence[int], vocabulary: int) -> Iterator[Any]:
    return (id for id in ids if type(id) is not int or not 0 <= id < vocabulary)


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        most = "" if high is None else f" to {high:,}"
        raise InvalidRequest(
            f"{name} should be a whole number from {low:,}{most or ' on'}, not {str(value)[:40]}", param=name
        )


def _number(name: str, value: Any, low: float, high: float) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} should be a number from {low:g} to {high:g}, not {str(value)[:40]}", param=name
        )
