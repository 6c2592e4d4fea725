from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from train import tiny
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError, LoricaError
from lorica.train import DataConfig, RowError, evaluate, metrics, predict, tasks, train
from lorica.train.data.splits import Splits

TASK = tasks.get("question-answering")


def row(question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
    }


def encode(*rows: dict[str, Any], limit: int = 32, labelled: bool = True, **data: Any) -> Any:
    table = Dataset.from_list(list(rows))
    config = TASK.resolve(Splits(table), DataConfig(**data))
    return TASK.encode(table, config, tiny.tokenizer(), limit, "the training rows", labelled=labelled)


def span(encoded: Any, window: int = 0) -> str:
    """The text between the first and the last token of the answer."""
    features = encoded.features[window]
    first, last = features["start_positions"], features["end_positions"]
    return features["context"][features["firsts"][first] : features["lasts"][last]]


def test_the_answers_tokens_are_found() -> None:
    encoded = encode(row("film", "great song of a dull plot", "dull plot"))
    assert span(encoded) == "dull plot"
    assert encoded.features["input_ids"][0][:4] == tiny.tokenizer()("film", "great")["input_ids"][:4]
    assert len(encoded) == 1


LONG = " ".join(tiny.OTHER * 5)


def test_a_long_text_is_read_in_windows_that_overlap() -> None:
    text = f"{LONG} great {LONG}"
    encoded = encode(row("film", text, "great"), limit=20, stride=5)
    features = encoded.features
    spans = [
        [(first, last) for first, last in zip(*each, strict=True) if first >= 0]
        for each in zip(features["firsts"], features["lasts"], strict=True)
    ]
    assert all(len(ids) <= 20 for ids in features["input_ids"])
    assert all(one[-5:] == two[:5] for one, two in itertools.pairwise(spans))
    covered = {pair for each in spans for pair in each}
    assert " ".join(text[first:last] for first, last in sorted(covered)) == text
    holds = [(text.index("great"), text.index("great") + 5) in each for each in spans]
    assert 1 <= sum(holds) < len(holds)
    for window, there in enumerate(holds):
        if there:
            assert span(encoded, window) == "great"
        else:
            assert features["start_positions"][window] == features["end_positions"][window] == 0
    assert (len(encoded), encoded.truncated, encoded.lengths) == (1, 0, [4 + 81])
    assert set(features["row"]) == {0}


def test_a_question_too_long_is_cut_and_counted() -> None:
    encoded = encode(row(LONG, "great song", "song"), limit=20)
    assert encoded.truncated == 1
    assert span(encoded) == "song"


def outputs(encoded: Any, *likely: tuple[int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are 0 but at the first and last tokens given, one pair a window."""
    width = max(map(len, encoded.features["input_ids"]))
    start, end = np.zeros((2, len(encoded.features), width))
    for window, (first, last, logit) in enumerate(likely):
        start[window, first] = end[window, last] = logit
    return start, end


def test_the_best_span_of_all_windows() -> None:
    text = "dull song " * 12 + "great film"
    encoded = encode(row("plot", text, "great film"), limit=20, stride=2)
    count = len(encoded.features)
    last = encoded.features[count - 1]
    places = last["start_positions"], last["end_positions"]
    (found,) = TASK.read(
        outputs(encoded, *[(5, 6, 1.0)] * (count - 1), (*places, 3.0)), encoded.features, DataConfig()
    )
    assert (found["answer"], found["start"]) == ("great film", text.index("great film"))
    assert 0.5 < found["score"] < 1


def test_spans_that_cannot_be() -> None:
    encoded = encode(row("plot", "great film", "film"))
    # The last token before the first, and a token of the question: the best that can be is another.
    for first, last in ((4, 3), (1, 1)):
        (found,) = TASK.read(outputs(encoded, (first, last, 9.0)), encoded.features, DataConfig())
        assert found["answer"] in ("great", "film", "great film")


def test_the_score_is_a_probability_by_hand() -> None:
    encoded = encode(row("plot", "great film", "film"), unanswerable=True)
    (found,) = TASK.read(outputs(encoded, (3, 4, 1.0)), encoded.features, DataConfig())
    # Spans (great), (great film), (film), and none, which has 0.
    odds = np.exp([1.0, 2.0, 1.0, 0.0])
    assert found == {"answer": "great film", "start": 0, "score": pytest.approx(odds[1] / odds.sum())}


def test_no_answer_where_none_is_allowed() -> None:
    encoded = encode(row("plot", "great film", "film"), row("plot", "dull song"))
    assert encoded.features["unanswerable"] == [True, True]
    assert encoded.features["start_positions"][1] == encoded.features["end_positions"][1] == 0
    said = TASK.read(outputs(encoded, (4, 4, 3.0), (0, 0, 3.0)), encoded.features, DataConfig())
    assert [each["answer"] for each in said] == ["film", ""]
    assert said[1]["start"] is None
    never = encode(row("plot", "great film", "film"))
    (found,) = TASK.read(outputs(never, (0, 0, 9.0)), never.features, DataConfig())
    assert found["answer"] != ""


def test_scores_of_whole_rows() -> None:
    encoded = encode(row("plot", "great film", "film"), row("plot", "dull song", "dull song"))
    logits: Any = outputs(encoded, (4, 4, 3.0), (4, 4, 3.0))
    scores = TASK.metrics(EvalPrediction(logits, None), encoded.features)  # type: ignore[arg-type]
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in 1066", ["1066", "the year 1066"], 0, 2 / 3),
        ("a b c", ["x"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),
        ("red red blue", ["red blue blue"], 0, 2 / 3),
    ],
)
def test_answers_by_hand(said: str, right: list[str], exact: float, f1: float) -> None:
    assert metrics.question_answering([said], [right]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_written_text_is_scored_in_the_same_way() -> None:
    said, right = ["The Eiffel Tower!", "in 1066", ""], [["eiffel tower"], ["1066", "the year 1066"], ["x"]]
    scores = metrics.written(said, right, ["exact_match", "f1"])
    assert scores == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 2 / 3 + 0) / 3)}
    assert scores == metrics.question_answering(said, right)


def test_the_two_kinds_of_questions_apart() -> None:
    scores = metrics.question_answering(["x", "y", ""], [["x"], [], []])
    assert scores["f1_answerable"] == 1
    assert scores["f1_unanswerable"] == 0.5
    assert scores["f1"] == pytest.approx(2 / 3)


def test_answers_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    # The answer is the one word of praise or blame in the text.
    rows = []
    for each in tiny.sentences(48):
        words = [word for word in each["text"].split() if word in tiny.OTHER]
        word = next(word for word in each["text"].split() if word in tiny.GOOD + tiny.BAD)
        rows.append(row("plot", " ".join([*words[:3], word, *words[3:]]), word))
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tiny_model, data, tmp_path / "out", epochs=12, learning_rate=1e-2)
    result = train(
        recipe.replace(task=TASK.name, data={"validation_fraction": 0.25}, method={"r": 8, "lora_alpha": 16})
    )
    assert result.metrics["validation"]["f1"] > 0.5
    config = json.loads((result.output / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])
    scores = evaluate(result.output, str(data))
    assert scores["rows"] == 48
    (said,) = predict(result.output, ["plot\tsong great film"])
    assert set(said) == {"question", "context", "answer", "start", "score"}
    assert said["context"][said["start"] :].startswith(said["answer"])
    assert predict(result.output, data)[0]["question"] == "plot"


def test_the_loss_does_not_hang_on_padding(tiny_model: Path) -> None:
    encoded = encode(row("film", "great song", "song"), row("film", "dull song of a cold light", "cold"))
    torch.manual_seed(0)
    model = TASK.model(str(tiny_model), DataConfig()).double().eval()
    collate = TASK.collator(tiny.tokenizer())
    kept = (*tiny.tokenizer().model_input_names, *TASK.label_columns)
    rows = [{key: feature[key] for key in kept if key in feature} for feature in encoded.features]

    def loss(*some: dict[str, Any]) -> float:
        batch = collate(list(some))
        outputs = model(**batch)
        own = TASK.loss(outputs, batch)
        assert own is not None
        if len(some) == 1:
            assert own.item() == pytest.approx(outputs.loss.item(), abs=1e-9)
        return own.item()

    assert loss(*rows) == pytest.approx((loss(rows[0]) + loss(rows[1])) / 2, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([{"question": "film", "context": "song"}], {}, "which column holds the answers"),
        ([{"question": "film", "answers": None}], {}, "the text that holds the answers"),
        ([row("film", "song", "song")], {"labels": ["x"]}, "has no classes"),
        ([row("film", "song", "song")], {"stride": 16}, "stride must be less than half of the 32"),
    ],
)
def test_configurations_that_do_not_fit(rows: Any, data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(*rows, **data)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"text": ["song"], "answer_start": [1]},
            "row 1 .* has the answer 'song' at character 1 .* has 'ong'",
        ),
        ({"text": ["song"], "answer_start": []}, "row 1 .* as many places as 'answer_start'"),
        ({"text": ["song"], "answer_start": [-1]}, "row 1 .* has the answer 'song' at character -1"),
        ({"words": ["song"]}, "row 1 .* where a list of answers"),
        ("song", "row 1 .* has 'song' in column 'answers'"),
        (None, "row 1 .* has None in column 'answers'"),
    ],
)
def test_answers_that_do_not_fit(answers: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        encode({"question": "film", "context": "song", "answers": answers})


def test_a_list_of_answers() -> None:
    encoded = encode(
        {"question": "film", "context": "song", "answers": [{"text": "song", "answer_start": 0}]}
    )
    assert span(encoded) == "song"


def test_a_slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny.tokenizer()), "is_fast", False)
    with pytest.raises(LoricaError, match=r"needs a fast one"):
        encode(row("film", "song", "song"))
