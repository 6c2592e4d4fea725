"""Token classification: a class for each word, such as names and parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, List
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.data.columns import find_column, find_label, label_list_ids, label_list_names, needs_column
from lorica.train.data.labels import notes_on_labels
from lorica.train.data.rows import RowError, Unusable, parsed_cell, read_each
from lorica.train.data.splits import Splits
from lorica.train.metrics.predictions import OUTSIDE, marks_spans, seqeval, spans, tagging
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, Task, needs_tokens, padded_right
from lorica.train.tasks.texts import logits_of, named_outputs, softmax

_WORDS = ("tokens", "words", "text")

_TAGS = ("ner_tags", "tags", "ner", "labels", "pos_tags", "upos", "label")

_IGNORED = -100

_TRUE = "classes"
"""The classes of the words that are read, by names: what the metrics compare with."""


class TokenClassification(Task):
    """A class for each word of a text, read off the word's first token.

    Rows have a list of words (``data.text``) and a list of as many classes, by name or id (``data.label``).
    Where the classes mark spans (``B-PER``, ``I-PER``, ``O``), whole spans are scored and told.
    """

    name = "token-classification"
    task_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    best_metric = "f1"
    tagged = True
    groups_lengths = False

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the columns of words and classes, and the classes' names."""
        if data.text_pair:
            raise ConfigError(f"{self.name} reads no pairs; leave out data.text_pair")
        text = find_column(splits.train, data.text, _WORDS, "lists of words", "text")
        label = find_label(splits.train, data.label, _TAGS)
        labels = data.labels or label_list_names(splits.train, label, folded=False)
        if not data.labels and len(labels) < 2:
            raise ConfigError(
                f"all words in column {label!r} of the training rows are {labels[0]!r}; classification needs "
                "at least two classes"
            )
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"data.labels must name at least two classes, each once, not {labels}")
        if marks_spans(labels):
            seqeval()  # if it is not installed, this is the time to say so
        return replace(data, text=text, label=label, labels=labels)

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
        """Tokenize the words; the first token of each bears its class."""
        assert data.text is not None
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} cannot tell which word a token is of; "
                f"{self.name} needs a fast one (tokenizer.json)"
            )
        words = _words(rows, data.text, where)
        limit = min(max_length, tokenizer.model_max_length)
        whole = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)["input_ids"]
        encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
        needs_tokens(encoding["input_ids"], where)
        features: dict[str, Any] = dict(encoding)
        features["first_tokens"] = [_first_tokens(encoding.word_ids(row)) for row in range(len(words))]
        features["words"] = [len(row) for row in words]
        features["length"] = [len(ids) for ids in encoding["input_ids"]]
        table = Dataset.from_dict(features)
        if labelled:
            table = _labelled(table, _classes(rows, words, data, where), data.labels or [])
        lengths = [len(ids) for ids in whole]
        truncated = sum(length > limit for length in lengths)
        return Encoded(table, truncated, max(lengths), lengths=lengths)

    def encodes_apart(self, rows: Dataset, data: DataConfig) -> bool:
        """True."""
        return type(self) is TokenClassification

    def head(self, data: DataConfig) -> dict[str, Any]:
        """As many outputs a token as classes, with their names."""
        return named_outputs(data.labels or [])

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pad tokens and classes to the longest row of the batch."""
        return DataCollatorForTokenClassification(padded_right(tokenizer))

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Of spans where the classes mark any: F1, precision and recall by seqeval; else those of words.

        Words past the longest length are not scored; ``words_read`` is the share of the others, where there
        are any.
        """
        names: list[str] = features.features[_TRUE].feature.names
        outputs = logits_of(outcome.predictions)
        true = features[_TRUE]
        said = [
            [int(row[token].argmax()) for _, token in firsts]
            for row, firsts in zip(outputs, features["first_tokens"], strict=True)
        ]
        if marks_spans(names):
            scores = tagging(*([[names[each] for each in row] for row in rows] for rows in (said, true)))
        else:
            scores = metrics.classification(np.concatenate(said), np.concatenate(true))
        read, words = sum(map(len, said)), sum(features["words"])
        return scores if read == words else {**scores, "words_read": read / words}

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """Labels that are not written as the classes they are taken for."""
        values = (item for items in rows[str(data.label)] for item in parsed_cell(items) or [])
        return notes_on_labels(values, data.labels or [], str(data.label))

    def remarks(self, data: DataConfig) -> list[str]:
        """That words are scored, and not spans."""
        if marks_spans(data.labels or []):
            return []
        return ["the classes do not mark spans (B-NAME, I-NAME, O), so the scores are those of single words"]

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The most likely class of each word and its probability, None for words past the longest length.

        Where the classes mark spans, also ``spans``: a label, and the places of the first word and of the one
        after the last.
        """
        names = data.labels or []
        answers = []
        for row, firsts, count in zip(
            logits_of(outputs), features["first_tokens"], features["words"], strict=True
        ):
            labels: list[str | None] = [None] * count
            sure: list[float | None] = [None] * count
            odds = softmax(row)
            for word, token in firsts:
                labels[word] = names[int(odds[token].argmax())]
                sure[word] = float(odds[token].max())
            answers.append({"labels": labels, "probabilities": sure})
            if marks_spans(names):
                answers[-1]["spans"] = spans([label or OUTSIDE for label in labels])
        return answers

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each text, its words apart at white space."""
        return Dataset.from_dict({data.text: [text.split() for text in texts]})


def _words(rows: Dataset, column: str, where: str) -> list[list[str]]:
    needs_column(rows, column, where)

    def read(value: Any) -> list[str]:
        value = parsed_cell(value)
        if not (isinstance(value, list) and value and all(isinstance(word, str) for word in value)):
            raise Unusable(f"has {value!r:.60} in column {column!r}, where a list of words is due")
        return value

    return read_each(rows[column], read, where)


def _classes(rows: Dataset, words: list[list[str]], data: DataConfig, where: str) -> list[list[int]]:
    assert data.label is not None
    classes = label_list_ids(rows, data.label, data.labels or [], where)
    unlike = [row for row, own in enumerate(classes) if len(own) != len(words[row])]
    if unlike:
        first = unlike[0]
        problem = (
            f"has {len(words[first])} words in column {data.text!r} and {len(classes[first])} labels in "
            f"column {data.label!r}"
        )
        raise RowError(unlike, where, problem)
    return classes


def _labelled(table: Dataset, classes: list[list[int]], names: list[str]) -> Dataset:
    """Encoded rows with the class of each first token, and those of the words that are read, by name."""
    labels: list[list[int]] = []
    read: list[list[int]] = []
    for own, firsts, length in zip(classes, table["first_tokens"], table["length"], strict=True):
        labels.append([_IGNORED] * length)
        for word, token in firsts:
            labels[-1][token] = own[word]
        read.append([own[word] for word, _ in firsts])
    table = table.add_column("labels", labels)  # type: ignore[call-arg]
    return table.add_column(_TRUE, read, feature=List(ClassLabel(names=names)))  # type: ignore[call-arg]


def _first_tokens(word_ids: Sequence[int | None]) -> list[list[int]]:
    """Word and place of each token that begins one."""
    return [
        [word, place]
        for place, word in enumerate(word_ids)
        if word is not None and (place == 0 or word_ids[place - 1] != word)
    ]
