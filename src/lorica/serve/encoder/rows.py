"""Texts as an encoder reads them: token ids, which of a pair each belongs to, which word each begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One text, or a pair of texts.

    Args:
        ids: its tokens.
        types: 0 or 1 for each, which text of a pair it is of; None where the model does not ask.
        words: its words, where each of them is to be told of.
        firsts: word and token, for each token that begins a word.
    """

    ids: list[int]
    types: list[int] | None = None
    words: tuple[str, ...] = ()
    firsts: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)


def rows_of(
    tokenizer: Any, given: Sequence[Any], *, words: bool = False, longest: int | None = None
) -> list[Row]:
    """Make rows.

    Args:
        tokenizer: the model's.
        given: texts, token ids, or pairs of texts.
        words: split each text at white space, and note the words; of token ids, each is one.
        longest: tokens after which a row is cut; None cuts none.
    """
    kinds = {type(part) for each in given for part in ([each] if isinstance(each, str) else each[:1])}
    if str not in kinds:
        return [_of_ids(tokenizer, list(ids)[:longest], words=words) for ids in given]
    cut = {"truncation": longest is not None, "max_length": longest, "verbose": False}
    texts: list[Any] = [text.split() if words and isinstance(text, str) else text for text in given]
    if isinstance(given[0], str):
        encoded = tokenizer(texts, is_split_into_words=words, **cut)
    else:
        encoded, words = tokenizer([one for one, _ in texts], [two for _, two in texts], **cut), False
    types = encoded.get("token_type_ids")
    return [
        Row(
            ids,
            None if types is None else types[i],
            tuple(texts[i]) if words else (),
            _firsts(encoded.word_ids(i)) if words else (),
        )
        for i, ids in enumerate(encoded["input_ids"])
    ]


def _of_ids(tokenizer: Any, ids: list[int], *, words: bool) -> Row:
    names = tuple(map(str, tokenizer.convert_ids_to_tokens(ids))) if words else ()
    return Row(ids, None, names, tuple((i, i) for i in range(len(names))))


def _firsts(words: Sequence[int | None]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (word, place)
        for place, word in enumerate(words)
        if word is not None and (place == 0 or words[place - 1] != word)
    )
