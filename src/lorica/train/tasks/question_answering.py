"""Extractive question answering: the place of the answer in a text.

A text that is longer than the model reads is given in windows that overlap, each with the question before it:

    [CLS] question [SEP] window 1 ......... [SEP]
    [CLS] question [SEP] ......... window 2 ......... [SEP]

In each window the model scores every token as the answer's first and as its last. The best span of all
windows is the answer; in a window without the answer, both point at the first token, which stands for "none".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.data.columns import check_texts, find_label, find_texts, needs_column
from lorica.train.data.rows import Unusable, parsed_cell, read_each
from lorica.train.data.splits import Splits
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, Task, needs_tokens, padded_right
from lorica.train.tasks.texts import softmax, split_pairs

_LABELS = ("answers", "answer", "label", "labels")

_BEST = 20
"""Likeliest first and last tokens that are paired."""

_LONGEST_ANSWER = 30
"""Tokens of an answer, as in the evaluation of BERT on SQuAD."""

_AT_ONCE = 1000


class Answer(NamedTuple):
    """An answer as people gave it."""

    text: str
    start: int


class QuestionAnswering(Task):
    """A span of a text that answers a question. Rows are as in SQuAD.

    ``data.text`` is the question, ``data.text_pair`` the text that holds the answer, and ``data.label`` a
    dictionary of two lists: ``text``, the answers, and ``answer_start``, the characters at which they begin.
    Empty lists say that the text has no answer (SQuAD 2.0).
    """

    name = "question-answering"
    task_type = "QUESTION_ANS"
    auto_class = "AutoModelForQuestionAnswering"
    best_metric = "f1"
    label_columns = ("start_positions", "end_positions")

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the three columns, and whether every question has an answer."""
        if data.labels:
            raise ConfigError(f"{self.name} has no classes; leave out data.labels")
        rows = splits.train
        columns = {name.lower(): name for name in rows.column_names}
        if data.text is None and data.text_pair is None:
            usual = [columns[name] for name in ("question", "context") if name in columns]
            question, context = usual if len(usual) == 2 else find_texts(rows, None, None)
        else:
            question, context = find_texts(rows, data.text, data.text_pair)
        if context is None:
            raise ConfigError(
                "there is no column with the text that holds the answers; name it with --data.text_pair, and "
                f"that of the questions with --data.text. The columns are: {', '.join(rows.column_names)}"
            )
        label = find_label(rows, data.label, _LABELS, "answers")
        data = replace(data, text=question, text_pair=context, label=label)
        if data.unanswerable is None:
            none = any(not answers for answers in _answers(rows, data, "the training rows"))
            data = replace(data, unanswerable=none)
        return data

    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Tokenize each question with each window of its text; find the answer's tokens in it."""
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} cannot tell where in a text a token stands; "
                f"{self.name} needs a fast one (tokenizer.json)"
            )
        columns = self.inputs(data)
        check_texts(rows, columns[:1], where, filled=labelled)
        check_texts(rows, columns[1:], where)
        answers = _answers(rows, data, where) if labelled else None
        limit = min(max_length, tokenizer.model_max_length)
        stride = _stride(data, limit)
        features: dict[str, list[Any]] = {}
        lengths: list[int] = []
        cut = 0
        # A part at a time: as Python's own numbers, the tokens of all windows would fill the memory.
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            questions, shortened = _shortened(tokenizer, part[columns[0]], limit // 2)
            own = answers and answers[start : start + _AT_ONCE]
            windows, whole = _windows(tokenizer, questions, part[columns[1]], own, limit, stride)
            windows["row"] = [start + row for row in windows["row"]]
            for name, values in windows.items():
                features.setdefault(name, []).extend(values)
            lengths += whole
            cut += shortened
        needs_tokens(features["input_ids"], where)
        features["unanswerable"] = [bool(data.unanswerable)] * len(features["row"])
        return Encoded(Dataset.from_dict(features), cut, max(lengths), rows=len(rows), lengths=lengths)

    def head(self, data: DataConfig) -> dict[str, Any]:
        """Two outputs a token: is it the answer's first, and is it its last?"""
        return {"num_labels": 2}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pad to the longest window of the batch."""
        return DataCollatorWithPadding(padded_right(tokenizer))

    def loss(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Cross-entropy of the first and the last token, over the tokens of each window, not its padding.

        The model's own loss counts padding among the places, so it depends on the other windows' lengths.
        """
        padding = inputs["attention_mask"] == 0
        losses = []
        for logits, name in zip((outputs.start_logits, outputs.end_logits), self.label_columns, strict=True):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(wide.masked_fill(padding, -torch.inf), inputs[name]))
        return torch.stack(losses).mean()

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Exact match and F1 of the answers, as SQuAD counts them."""
        found = best_spans(outcome.predictions, features)
        references = dict(zip(features["row"], features["answers"], strict=True))
        return metrics.question_answering(
            [answer["answer"] for answer in found], [references[row] for row in sorted(references)]
        )

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The answer, its place in the text, and its probability among the likeliest spans; "" for none."""
        return best_spans(outputs, features)

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each question and text, given with a tab between."""
        return split_pairs(texts, self.inputs(data))


def best_spans(outputs: Any, features: Dataset) -> list[dict[str, Any]]:
    """The likeliest answer to each row's question.

    Args:
        outputs: logits of the first and the last token, each (windows, tokens).
        features: the windows; see `QuestionAnswering.encode`.

    Returns:
        ``answer``, ``start`` (None for no answer) and ``score``, the probability among the spans that were
        compared, in one dictionary per row.
    """
    starts, ends = (np.asarray(logits, np.float64) for logits in outputs[:2])
    candidates: dict[int, list[tuple[float, int, int]]] = {}
    none: dict[int, float] = {}
    contexts: dict[int, str] = {}
    keys = ("row", "firsts", "lasts", "context", "unanswerable")
    for start, end, row, *places, context, optional in zip(
        starts, ends, *(features[key] for key in keys), strict=True
    ):
        contexts[row] = context
        candidates.setdefault(row, []).extend(_spans(start, end, *map(np.array, places)))
        if optional:
            # A row has no answer only if no window has: the least sure of them decides.
            none[row] = min(none.get(row, np.inf), float(start[0] + end[0]))
    return [_answer(contexts[row], candidates[row], none.get(row)) for row in sorted(contexts)]


def _spans(
    start: np.ndarray, end: np.ndarray, firsts: np.ndarray, lasts: np.ndarray
) -> list[tuple[float, int, int]]:
    """Score, first and last character of the likeliest spans in a window."""
    inside = np.flatnonzero(firsts >= 0)
    best, other = (inside[np.argsort(-logits[inside], kind="stable")[:_BEST]] for logits in (start, end))
    return [
        (float(start[one] + end[two]), int(firsts[one]), int(lasts[two]))
        for one in best
        for two in other
        if 0 <= two - one < _LONGEST_ANSWER
    ]


def _answer(context: str, spans: list[tuple[float, int, int]], none: float | None) -> dict[str, Any]:
    # The same characters may be in two windows; they count once.
    best = {(first, last): score for score, first, last in sorted(spans)}
    ranked = sorted(((score, span) for span, score in best.items()), key=lambda each: (-each[0], each[1]))[
        :_BEST
    ]
    scores = np.array([score for score, _ in ranked] + ([none] if none is not None else []))
    if not len(scores):
        return {"answer": "", "start": None, "score": 0.0}
    odds = softmax(scores)
    if not ranked or (none is not None and none > ranked[0][0]):
        return {"answer": "", "start": None, "score": float(odds[-1])}
    first, last = ranked[0][1]
    return {"answer": context[first:last], "start": first, "score": float(odds[0])}


def _answers(rows: Dataset, data: DataConfig, where: str) -> list[list[Answer]]:
    """The answers to each row's question, each found where it says it is."""
    column, context = data.label, data.text_pair
    assert column is not None
    assert context is not None
    needs_column(rows, column, where)
    check_texts(rows, [context], where)

    def read(row: tuple[Any, str]) -> list[Answer]:
        value, text = parsed_cell(row[0]), row[1]
        # datasets turns a list of dictionaries into a dictionary of lists, or leaves it as it is.
        lists = value if isinstance(value, dict) else _gathered(value)
        texts, starts = lists.get("text"), lists.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise Unusable(
                f"has {value!r:.80} in column {column!r}, where a list of answers as 'text' and one of as "
                "many places as 'answer_start' are due"
            )
        for said, start in zip(texts, starts, strict=True):
            there = text[start : start + len(said)] if isinstance(start, int) and start >= 0 else None
            if there != said:
                raise Unusable(
                    f"has the answer {said!r:.60} at character {start} in column {column!r}, where column "
                    f"{context!r} has {there!r:.60}"
                )
        return [Answer(*pair) for pair in zip(texts, starts, strict=True)]

    return read_each(zip(rows[column], rows[context], strict=True), read, where)


def _gathered(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return {}
    return {name: [item.get(name) for item in value] for name in ("text", "answer_start")}


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    texts: list[str],
    answers: list[list[Answer]] | None,
    limit: int,
    stride: int,
) -> tuple[dict[str, list[Any]], list[int]]:
    """Features of some rows, one window each, and the tokens of each row before it is cut into windows."""
    whole = tokenizer(questions, texts, truncation=False, verbose=False)["input_ids"]
    encoding = tokenizer(
        questions,
        texts,
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = (encoding.pop(name) for name in ("overflow_to_sample_mapping", "offset_mapping"))
    features: dict[str, list[Any]] = {
        name: [np.array(ids, np.int32) for ids in values] for name, values in encoding.items()
    }
    # Where in the text each of its tokens stands; -1 for those of the question.
    inside = [np.array([part == 1 for part in encoding.sequence_ids(i)]) for i in range(len(owners))]
    places = [np.array(spans, np.int32) for spans in offsets]
    for name, side in (("firsts", 0), ("lasts", 1)):
        features[name] = [
            np.where(own, spans[:, side], -1).astype(np.int32)
            for own, spans in zip(inside, places, strict=True)
        ]
    features["row"] = list(owners)
    features["context"] = [texts[row] for row in owners]
    features["length"] = [len(ids) for ids in features["input_ids"]]
    if answers is not None:
        features["answers"] = [[answer.text for answer in answers[row]] for row in owners]
        found = [
            _place(firsts, lasts, answers[row])
            for firsts, lasts, row in zip(features["firsts"], features["lasts"], owners, strict=True)
        ]
        features["start_positions"], features["end_positions"] = (
            [*side] for side in zip(*found, strict=True)
        )
    return features, [len(ids) for ids in whole]


def _stride(data: DataConfig, limit: int) -> int:
    if data.stride is None:
        return limit // 4
    if data.stride >= limit // 2:
        raise ConfigError(
            f"data.stride must be less than half of the {limit} tokens of a window, not {data.stride}"
        )
    return data.stride


def _shortened(tokenizer: PreTrainedTokenizerBase, questions: list[str], limit: int) -> tuple[list[str], int]:
    """Questions that leave the text at least half a window, and the number cut for that."""
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    short = [
        question if len(spans) <= limit - 4 else question[: spans[limit - 5][1]]
        for question, spans in zip(questions, encoded["offset_mapping"], strict=True)
    ]
    return short, sum(one != other for one, other in zip(short, questions, strict=True))


def _place(firsts: np.ndarray, lasts: np.ndarray, answers: list[Answer]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the window does not hold it whole."""
    if not answers:
        return 0, 0
    start, end = answers[0].start, answers[0].start + len(answers[0].text)
    inside = np.flatnonzero((firsts >= 0) & (firsts < end) & (lasts > start))
    if not len(inside) or firsts[inside[0]] > start or lasts[inside[-1]] < end:
        return 0, 0
    return int(inside[0]), int(inside[-1])
