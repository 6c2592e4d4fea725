from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from study import made

import lorica
from lorica import study
from lorica.checkpoint import loralib
from lorica.cli import main
from lorica.errors import AdapterError, FileError
from lorica.study.folder import write_report
from lorica.study.report import gather, spread

pytest.importorskip("matplotlib")

BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None
)


def trained(seed: int, r: int = 4) -> lorica.Adapter:
    layers = {
        f"h.{i}.{name}": made.gaussian(24, 24, r, seed=100 * seed + 2 * i + (name == "v"))
        for i in range(3)
        for name in "qv"
    }
    return made.adapter(layers)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return made.write_base(
        tmp_path / "base", {f"h.{i}.{n}.weight": torch.randn(24, 24) for i in range(3) for n in "qv"}
    )


@pytest.fixture
def written(tmp_path: Path, base: Path) -> Path:
    report = gather(
        trained(0), name="</script><b>mine", base=base, against=trained(1, 6), against_name="other"
    )
    return write_report(report, tmp_path / "report")


def test_everything_is_written(written: Path) -> None:
    names = {path.name for path in written.parent.iterdir()}
    kinds = ("spectra", "similarity", "layers", "amplification", "overlap")
    figures = {f"{n}.{s}" for n in kinds for s in ("png", "svg")}
    assert names == figures | {"index.html", "study.json"}
    data = json.loads((written.parent / "study.json").read_text())
    assert data["amplification"].keys() == data["drift"].keys() == data["spectrum"]["layers"].keys()
    assert len(data["similarity"]["layers"]["h.0.q"]["phi"]) == 4
    assert all((written.parent / name).stat().st_size > 1000 for name in figures)


def test_the_page_needs_nothing_else(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(str(v) for k, v in attrs if k in ("src", "href", "srcset"))

    Links().feed(text)
    assert links == ["data:,"]
    assert "<b>mine" not in text  # names are text, wherever they come from
    sections = json.loads(re.findall(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[0])
    titles = " ".join(section["title"] for section in sections)
    for part in ("Advice", "Spectra", "figures 3 and 6", "table 7", "figure 8"):
        assert part in titles


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_in_a_browser(width: int, dark: bool, written: Path, tmp_path: Path) -> None:
    """It draws itself without an error, has something in every section, and is no wider than a phone."""
    probe = """<script>
    addEventListener("error", event => document.body.dataset.failed = event.message);
    addEventListener("load", () => {
      const boxes = [...document.querySelectorAll("section")];
      const button = document.querySelectorAll("th button")[1];
      button.click();
      const rows = [...button.closest("table").querySelectorAll("tbody tr")];
      const column = rows.map(r => +r.children[1].textContent);
      const over = new PointerEvent("pointermove", {clientX: 60, clientY: 60});
      document.querySelector("canvas").dispatchEvent(over);
      Object.assign(document.body.dataset, {
        sections: boxes.length, empty: boxes.filter(b => b.children.length < 2).length,
        sorted: column.every((x, i) => !i || column[i - 1] >= x),
        tip: document.getElementById("tip").textContent,
        wide: document.documentElement.scrollWidth > innerWidth,
        back: getComputedStyle(document.body).backgroundColor,
      });
    });</script>"""
    page = tmp_path / "probed.html"
    text = written.read_text(encoding="utf-8")
    page.write_text(text.replace("<head>", "<head>" + probe), encoding="utf-8")
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", *theme]
    if folder := os.environ.get("LORICA_SCREENSHOTS"):
        shot = Path(folder) / f"report-{width}-{'dark' if dark else 'light'}.png"
        subprocess.run(
            [*command, f"--screenshot={shot}", written.as_uri()], check=True, timeout=60, capture_output=True
        )
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, timeout=60, capture_output=True, text=True
    )
    body = re.findall(r"<body[^>]*>", done.stdout)[0]
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', body))
    assert "failed" not in found, found
    assert int(found["sections"]) >= 8
    assert (found["empty"], found["sorted"], found["wide"]) == ("0", "true", "false")
    assert re.search(r": \d", found["tip"])
    assert (found["back"] == "rgb(20, 24, 28)") is dark


def test_two_seeds_of_one_rank_are_the_other_figure(tmp_path: Path) -> None:
    report = gather(trained(0), against=trained(1), against_name="seed 1")
    text = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    assert "figures 4 and 7" in text
    assert "table 7" not in text


def test_what_is_untrained_is_said(tmp_path: Path) -> None:
    nothing = made.adapter({"h.0.q": lorica.Factors(torch.randn(2, 5), torch.zeros(4, 2), 1.0)})
    report = gather(nothing)
    assert report.advice is None
    assert report.notes == ("1 of 1 updates are zero",)
    assert "1 of 1 updates are zero" in write_report(report, tmp_path / "out").read_text(encoding="utf-8")


def test_the_command(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        lorica.write(trained(seed), tmp_path / f"seed-{seed}")
    argv = ["study", str(tmp_path / "seed-0"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--against", str(tmp_path / "seed-1"), "--base", str(base), "--budget", "400"]) == 0
    out = capsys.readouterr().out
    assert "q of layer 0: this adapter used" in out
    assert (tmp_path / "out" / "index.html").is_file()
    cut = tmp_path / "cut"
    assert main([*argv, "--budget", "400", "--cut", str(cut)]) == 0
    advised = study.advise(trained(0), budget=400)
    kept = {path: layer.rank for path, layer in advised.layers.items() if layer.rank}
    assert {path: f.r for path, f in lorica.read(cut).factors.items()} == kept
    assert main([*argv, "--cut", str(cut)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*argv, "--budget", "3"]) == 1
    assert "buys no direction" in capsys.readouterr().err


def test_a_loralib_file_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loralib.write(trained(0), tmp_path / "lora.pt")
    argv = ["study", str(tmp_path / "lora.pt"), "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "does not hold lora_alpha" in capsys.readouterr().err
    assert main([*argv, "--alpha", "8"]) == 0


def test_bad_input(tmp_path: Path, base: Path) -> None:
    with pytest.raises(AdapterError, match=r"\(20, 20\), the base's \(24, 24\)"):
        gather(made.adapter({"h.0.q": made.gaussian(20, 20, 2)}), base=base)
    with pytest.raises(AdapterError, match="no layer that can be compared"):
        gather(trained(0), against=made.adapter({"up": made.gaussian(20, 20, 2)}))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write to"):
        write_report(gather(trained(0)), tmp_path / "file")


def test_spread() -> None:
    assert spread(list("abc"), 6) == list("abc")
    assert spread([str(i) for i in range(96)], 5) == ["0", "24", "48", "71", "95"]
