from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from study import made

import lorica
from lorica import algebra, study
from lorica.checkpoint import loralib
from lorica.cli import main
from lorica.cli.adapters.study import facts_of
from lorica.errors import AdapterError, FileError
from lorica.study import figures
from lorica.study.figures import write_report
from lorica.study.page import page
from lorica.study.report import gather, spread

pytest.importorskip("matplotlib")


def trained(seed: int, r: int = 4) -> lorica.Adapter:
    layers = {
        f"h.{i}.{name}": made.gaussian(24, 24, r, seed=100 * seed + 2 * i + (name == "v"))
        for i in range(3)
        for name in "qv"
    }
    return made.adapter(layers)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {f"h.{i}.{n}.weight": torch.randn(24, 24) for i in range(3) for n in "qv"}
    return made.write_base(tmp_path_factory.mktemp("study") / "base", weights)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    report = gather(
        trained(0), name="</script><b>mine", base=base, against=trained(1, 6), against_name="other"
    )
    return write_report(report, tmp_path_factory.mktemp("study") / "report")


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
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[0])
    titles = " ".join(section["title"] for section in data["sections"])
    for part in ("Which rank is enough", "Singular values", "figures 3 and 6", "table 7", "figure 8"):
        assert part in titles
    assert ["compared with", "other"] in data["facts"]
    assert {title for title, _ in data["facts"]} >= {"parameters", "date"}
    for section in data["sections"]:
        assert section["kind"] != "heat" or (section["scale"] and section["y"] and section["max"] >= 1)


def test_the_recipe_beside_it_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: evil.py:Task\ndata: {train: reviews.csv}\n")
    assert facts_of(str(tmp_path)) == {"task": "evil.py:Task", "trained on": "reviews.csv"}
    (tmp_path / "recipe.yaml").write_text("[" * 3000)
    assert facts_of(str(tmp_path)) == {}


def test_two_seeds_of_one_rank_are_the_other_figure() -> None:
    text = page(gather(trained(0), against=trained(1), against_name="seed 1"))
    assert "figures 4 and 7" in text
    assert "table 7" not in text


def test_what_is_untrained_is_said() -> None:
    nothing = made.adapter({"h.0.q": lorica.Factors(torch.randn(2, 5), torch.zeros(4, 2), 1.0)})
    report = gather(nothing)
    assert report.advice is None
    assert report.notes == ("1 of 1 updates are zero",)
    assert "1 of 1 updates are zero" in page(report)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are asked for, and not drawn, which takes seconds and is seen above."""
    monkeypatch.setattr(figures, "save_figure", lambda draw, path: path.touch())


@pytest.mark.usefixtures("undrawn")
def test_the_command(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        lorica.write(trained(seed), tmp_path / f"seed-{seed}")
    argv = ["study", str(tmp_path / "seed-0"), "--output", str(tmp_path / "out")]
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


@pytest.mark.usefixtures("undrawn")
def test_a_loralib_file_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loralib.write(trained(0), tmp_path / "lora.pt")
    argv = ["study", str(tmp_path / "lora.pt"), "--output", str(tmp_path / "out")]
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


def whole() -> lorica.Adapter:
    return lorica.Adapter(lorica.FullConfig(), {}, {"h.0.q.weight": torch.randn(4, 4)})


def test_what_has_no_low_rank_update_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AdapterError, match=r"no update s·B·A to study: its method is full, .* 1 tensors"):
        gather(whole())
    with pytest.raises(AdapterError, match="no layer that can be compared"):
        gather(trained(0), against=whole())
    lorica.write(whole(), tmp_path / "full")
    assert main(["study", str(tmp_path / "full"), "--output", str(tmp_path / "out")]) == 1
    assert "lorica study forget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_updates_of_stacked_experts_are_no_single_product() -> None:
    """Their factors interleave the experts', so a product of the two would be something else."""
    stack = lorica.Factors(torch.randn(6, 5), torch.randn(4, 6), 1.0, "parameter")
    config = lorica.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.up"])
    adapter = lorica.Adapter(config, {"h.0.mlp": stack})
    looks = [study.spectrum, study.norms, study.correlation, study.advise, gather]
    for look in (*looks, lambda a: study.similarity(a, a, paths=["h.0.mlp"])):
        with pytest.raises(AdapterError, match="is the update of a parameter"):
            look(adapter)


def test_a_compressed_copy_is_no_stranger() -> None:
    """Other factors of the same ΔW share all its directions, and so does its best cut as many as it has."""
    one = trained(0, 6)
    mixes = {path: torch.randn(6, 6).double() + 4 * torch.eye(6).double() for path in one.factors}
    copies = {
        path: lorica.Factors(
            mixes[path] @ f.A.double(), f.B.double() @ torch.linalg.inv(mixes[path]), f.scale
        )
        for path, f in one.factors.items()
    }
    small = algebra.compress(one, rank=2)[0]
    for other, share in ((made.adapter(copies), None), (small, 2)):
        report = gather(one, against=other)
        assert report.similarity is not None
        assert report.written is not None
        for path, f in one.factors.items():
            S = torch.linalg.svdvals(made.dense(f))
            kept = float((S[:share].square().sum() / S.square().sum()).sqrt())
            for side in (report.similarity, report.written):
                phi = side.layers[path].phi
                assert torch.allclose(phi.diagonal(), torch.ones(len(phi.diagonal())).to(phi), atol=1e-5)
            assert report.alike[path].cosine == pytest.approx(kept, abs=1e-6)


def test_names_in_a_figure_stand_at_their_own_rows() -> None:
    layers = {f"h.{i}.{n}": made.gaussian(6, 5, 2, seed=i) for i in range(60) for n in ("q", "v")}
    report = gather(made.adapter(layers))
    axis = figures.layers_among_themselves(report).axes[0]
    paths = list(layers)
    for ticks, texts in (
        (axis.get_xticks(), axis.get_xticklabels()),
        (axis.get_yticks(), axis.get_yticklabels()),
    ):
        for tick, text in zip(ticks, texts, strict=True):
            block, name = text.get_text().split()
            assert paths[round(tick) - 1] == f"h.{block}.{name}"
