from __future__ import annotations

from pathlib import Path

import pytest

from lorica.compare.report import draw, drawn, write_table
from lorica.compare.table import Cost, Score, Table


def score(method: str, centre: float | None, best: bool = False) -> Score:
    values: list[float | None] = [] if centre is None else [centre, centre]
    return Score("rte", None, "accuracy", method, 1e-3, values, centre, 0.01, 0, best=best)


def cost(method: str, trainable: int | None, series: str | None = None) -> Cost:
    return Cost(method, "additive", series, trainable, 4_000, 0.25, 900_000_000)


TABLE = Table(
    [score("r=1", 0.6), score("r=4", 0.7, True), score("prompt", 0.5), score("none", None)],
    [cost("r=1", 100, "lora"), cost("r=4", 400, "lora"), cost("prompt", 0), cost("none", None)],
    "mean",
    "test",
    [],
)


def test_points_and_lines() -> None:
    pytest.importorskip("matplotlib")
    figure = draw(TABLE)
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    points = [tuple(map(float, (*line.get_xdata(), *line.get_ydata()))) for line in axis.lines]
    assert (100.0, 0.6) in points
    assert (100.0, 400.0, 0.6, 0.7) in points  # the series
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["r=1", "r=4", "prompt"]


def test_written_whole_with_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [path.name for path in write_table(TABLE, tmp_path)]
    assert files == ["quality.png", "quality.svg", "table.md", "table.json"]
    again = {name: (tmp_path / name).read_bytes() for name in files}
    write_table(TABLE, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files} == again
    empty = Table([score("a", None)], [cost("a", None)], "mean", "test", [])
    assert drawn(empty) == {}


def test_the_best_is_bold_and_gaps_are_shown() -> None:
    head, rows = TABLE.rows()
    assert head == [
        "method", "class", "trainable", "rte (accuracy)", "checkpoint", "s/step", "peak memory"
    ]  # fmt: skip
    assert rows[1] == ["r=4", "additive", "400", "**70.0 ± 1.0**", "4.0 kB", "0.250", "900.0 MB"]
    assert rows[3][2:4] == ["–", "–"]
    assert "| r=1 | additive | 100 | 60.0 ± 1.0 | 4.0 kB | 0.250 | 900.0 MB |" in TABLE.markdown()
