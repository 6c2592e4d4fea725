"""Tokens with their probabilities, as OpenAI's two endpoints lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorica.serve.engine import Token
from lorica.serve.http.text import Texts

LEAST = -9999.0
"""Stands for the logarithm of 0, for which JSON has no sign; OpenAI's and vLLM's."""


def of_completion(texts: Texts, tokens: Sequence[Token], offset: int, top: int) -> dict[str, Any]:
    """The object of `/v1/completions`: four lists.

    Args:
        texts: the tokenizer.
        tokens: the tokens.
        offset: characters of the text before the first of them.
        top: number of most likely tokens beside each.
    """
    pieces = [texts.piece(token.id)[0] for token in tokens]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    tops = [
        None
        if token.logprob is None
        else {texts.piece(other)[0]: _finite(logprob) for other, logprob in reversed(token.top[:top])}
        for token in tokens
    ]
    return {
        "tokens": pieces,
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


def of_chat(texts: Texts, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """The object of `/v1/chat/completions`: an entry for each token."""
    content = [
        {
            **_entry(texts, token.id, token.logprob or 0.0),
            "top_logprobs": [_entry(texts, other, logprob) for other, logprob in token.top[:top]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(texts: Texts, token: int, logprob: float) -> dict[str, Any]:
    text, raw = texts.piece(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
