"""PEFT's own LoRA tests, with lorica's names in the place of PEFT's: how many pass?

Downloads PEFT's source from the package index, runs its tests of LoRA offline on tiny models, and asks PEFT
itself about those that fail: what PEFT does not pass here either does not count. Half an hour of a core.

    python bench/peft_suite.py                          all tests, a table, bench/results/peft_suite.json
    python bench/peft_suite.py --groups config,mapping  these test files alone; only prints
    python bench/peft_suite.py --again                  what failed last time; only prints
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness import publish

VERSION = "0.21.2"
HERE = Path(__file__).resolve().parent
PLUGINS = HERE / "peft_tests"
KINDS = ("public", "naming", "internal")
ABOUT = {
    "public": "names that PEFT documents",
    "naming": "names of layers, parameters and modules",
    "internal": "how PEFT is built inside",
}
# Test files that share a process, the slowest first.
GROUPS = (
    "custom_models",
    "config,decoder_models",
    "mapping,lora_variants,loraplus,lorafa,lora_conversion,hub_features,low_level_api",
    "helpers,mixed,tuners_utils,lora_ga",
    "target_parameters,encoder_decoder_models,feature_extraction_models,seq_classifier",
    "trainable_tokens,other,auto",
    "token_classification_qa,lora_intruders,arrow,bdlora,velora,xlora,integrations",
    "initialization",
)
# What an error says, or a test is called, where a method is refused on purpose, or PEFT refuses what
# is right here → the method, and why.
REFUSED = {
    r"[Vv]e[Ll]o[Rr][Aa]": "VeLoRA: compresses activations, so gradients are not the model's",
    r"KaSA|[Kk]asa": "KaSA: rewrites W0 and needs a loss of its own in the training loop",
    r"MonteCLoRA|montec": "MonteCLoRA: draws the weights anew in each pass",
    r"BD-LoRA|[Bb]d[Ll]ora": "BD-LoRA: block-diagonal factors for one layout of sharding",
    r"Arrow routing|[Aa]rrow": "Arrow: routes tokens over several adapters",
    r"QA-LoRA|[Qq][Aa]_?[Ll]ora": "QA-LoRA: pools inputs by the groups of one quantizer",
    r"activated LoRA|\b[Aa][Ll]ora\b|alora_": "activated LoRA: acts from an invocation text on",
    r"in a grouped convolution the update|Groups\d* LoRA with DoRA": "DoRA of a grouped convolution: no "
    "row of the weight has one norm",
    r"\bmica\b|MiCA": "MiCA: a start that freezes a factor",
    r"Megatron|megatron": "Megatron's layers: need Megatron",
    r"mixed=True|PeftMixedModel|test_mixed": "mixed models: several of PEFT's methods in one model",
    r"peft_type is '(?!LORA)": "files of PEFT's other methods",
    r"xlora|XLora": "X-LoRA: a router over adapters",
    r"test_lora_config_pissa_olora_warns|pattern_and_rslora_raises.*DID NOT RAISE": "no refusal: PiSSA and "
    "its kind with rslora and patterns are converted, which PEFT warns of and refuses",
    "test_load_pissa_olora_with_other_adapter_warns": "no refusal: PiSSA's files hold an update of the "
    "untouched base, so no other adapter is disturbed; PEFT warns",
    r"test_generate_pos_args.*DID NOT RAISE": "no refusal: generate takes its inputs by position, where PEFT "
    "raises",
    r"_register_custom_module|TestDynamicDispatch": "wrappers of the caller's own: layers change their class "
    "in place, and nothing is wrapped",
    r"TestNamingConflictWarning(?s:.*): linear in the adapter, Linear in the model": "adapters beside a base "
    "that transformers' from_pretrained loads: it puts PEFT's layers on the model",
    r"test_mha_with_dora_raises.*DID NOT RAISE": "no refusal: DoRA of an nn.MultiheadAttention is computed",
    r"different_target_parameters_raises.*DID NOT RAISE": "no refusal: adapters of different parameters "
    "stand beside each other",
    r"same_modules_to_save_merging_adapters_raises.*DID NOT RAISE": "no refusal: whole copies that are equal "
    "are combined; those that differ are refused",
    "test_warn_for_tied_embeddings_merge": "no warning before a merge: tied tables that differ after it are "
    "untied, and that is said",
    r"test_converted_lora_to_lora": "convert_to_lora: turns PEFT's other methods into LoRA; lorica.compress "
    "lowers a rank",
    r"TestDisableInputDtypeCasting.*DID NOT RAISE": "no refusal: inputs of another dtype than the weights' "
    "are computed, where PEFT raises",
}


class Outcome(NamedTuple):
    """A test that PEFT passes: its kind, whether it passes with lorica, and if not, why."""

    id: str
    kind: str
    passed: bool
    why: str


def main() -> int:
    """Run, print, and keep the table of a whole run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", help="test files by their short names, joined by commas")
    parser.add_argument("--again", action="store_true", help="only the tests that failed last time")
    parser.add_argument("--work", type=Path, default=Path("runs/peft_suite"), help="folder to work in")
    parser.add_argument("--show", type=int, default=12, help="causes of failure to print")
    parser.add_argument("--rounds", type=int, help="accepted; nothing is timed")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    python = prepare(work)
    groups = (chosen.groups,) if chosen.groups else GROUPS
    for group in groups:
        run_group(python, work, group, again=chosen.again)
    files = {name for group in groups for name in group.split(",")}
    outcomes = [o for o in read(work) if file_of(o.id) in files]
    refused = {o.id: reason for o in outcomes if not o.passed and (reason := refusal(o))}
    report(outcomes, refused, chosen.show)
    if not chosen.groups and not chosen.again:
        keep(outcomes, refused)
    return 0


def prepare(work: Path) -> Path:
    """Fetch PEFT's tests, an environment for them on top of this one, and models to run them on."""
    work.mkdir(parents=True, exist_ok=True)
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        site = Path(output(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
        ours = [path for path in sys.path if path.endswith("site-packages")] + [str(HERE.parent / "src")]
        (site / "ours.pth").write_text("\n".join(ours) + "\n")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"peft=={VERSION}", "pytest", "parameterized", "diffusers"], check=True)
    tests = work / "suite" / "tests"
    if not tests.exists():
        source = work / f"peft-{VERSION}.tar.gz"
        download = ["download", "-q", "--no-binary", ":all:", "--no-deps", f"peft=={VERSION}", "-d", work]
        subprocess.run([python, "-m", "pip", *download], check=True)
        with tarfile.open(source) as archive:
            archive.extractall(work, filter="data")
        tests.parent.mkdir(exist_ok=True)
        (work / f"peft-{VERSION}" / "tests").rename(tests)
        (tests / "__init__.py").touch()
        if not (tests / "conftest.py").exists():
            (tests / "conftest.py").write_text(
                'def pytest_addoption(parser):\n    parser.addoption("--regression", action="store_true")\n'
            )
        markers = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
        (tests.parent / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n" + "".join(f"    {name}: PEFT's own\n" for name in markers)
        )
    if not (work / "hub").exists():
        print(f"making tiny models ({work / 'hub.log'}) ...", flush=True)
        make = [python, PLUGINS / "stand_ins.py", work / "hub.new"]
        with (work / "hub.log").open("w") as log:
            subprocess.run(make, check=True, env=environment(work), stdout=log, stderr=subprocess.STDOUT)
        (work / "hub.new").rename(work / "hub")
    return python


def output(python: Path, program: str) -> str:
    """What a program prints."""
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def environment(work: Path, **more: str) -> dict[str, str]:
    """One thread, no network, the stand-in models."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_CACHE": str(work / "hub"),
        "PYTHONPATH": f"{HERE.parent / 'src'}{os.pathsep}{PLUGINS}{os.pathsep}.",
        **more,
    }


def run_group(python: Path, work: Path, group: str, *, again: bool) -> None:
    """Run some test files with lorica's names, then those that failed with PEFT's."""
    known = notes(work / "peft")
    before = {note["id"] for note in notes(work / "lorica").values() if note["outcome"] == "failed"}
    files = set(group.split(","))
    run(python, work, "lorica", group, [i for i in before if file_of(i) in files] if again else None)
    failed = [
        note["id"]
        for note in notes(work / "lorica").values()
        if note["outcome"] == "failed" and note["id"] not in known and file_of(note["id"]) in files
    ]
    if failed:
        run(python, work, "peft", group, failed)


def run(python: Path, work: Path, side: str, group: str, only: Iterable[str] | None) -> None:
    """Run some test files on one side; notes of tests that run again replace the old ones."""
    folder = work / side
    folder.mkdir(exist_ok=True)
    name = group.partition(",")[0]
    path = folder / f"{name}.jsonl"
    more = {"SUITE_NOTES": str(path)}
    if only is not None:
        (folder / f"{name}.ids").write_text("\n".join(only) + "\n")
        more["SUITE_ONLY"] = str(folder / f"{name}.ids")
    else:
        path.unlink(missing_ok=True)
    plugins = ["-p", "selection", *(["-p", "names"] if side == "lorica" else [])]
    # The other styles of traceback parse a test file of 8,000 lines anew for each failure.
    options = ["-q", "--tb=native", "-p", "no:cacheprovider"]
    files = [f"tests/test_{each}.py" for each in group.split(",")]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [python, "-m", "pytest", *plugins, *options, *files],
            cwd=work / "suite",
            env=environment(work, **more),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    last = (folder / f"{name}.log").read_text().rstrip().rpartition("\n")[2]
    print(f"{side:7}{group[:60]:62}{last}", flush=True)


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """Test id → what became of it last."""
    found = (json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open())
    return {note["id"]: note for note in found}


def read(work: Path) -> list[Outcome]:
    """Every test that PEFT passes here. What passes with lorica's names passes with PEFT's."""
    kinds = json.loads((PLUGINS / "kinds.json").read_text())
    ours, theirs = notes(work / "lorica"), notes(work / "peft")
    outcomes = []
    for id, note in ours.items():
        passed = note["outcome"] == "passed"
        if passed or (note["outcome"] == "failed" and theirs.get(id, {}).get("outcome") == "passed"):
            said = " | ".join([note.get("error", ""), *note.get("causes", ())])
            outcomes.append(
                Outcome(id, kind_of(id, kinds), passed, "" if passed else f"{said} <{note['where']}>")
            )
    return outcomes


def file_of(id: str) -> str:
    """The short name of a test's file."""
    return id.partition("::")[0].removeprefix("tests/test_").removesuffix(".py")


def kind_of(id: str, kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Which names a test leans on."""
    of_file = kinds.get(file_of(id), {"default": "public"})
    name = id.partition("::")[2].partition("[")[0]
    return next((kind for kind in KINDS if name in of_file.get(kind, ())), of_file["default"])


def refusal(outcome: Outcome) -> str | None:
    """Why the method that a test is about is refused; None if it is not."""
    text = f"{outcome.id} {outcome.why}"
    return next((reason for pattern, reason in REFUSED.items() if re.search(pattern, text)), None)


def report(outcomes: list[Outcome], refused: Mapping[str, str], show: int) -> None:
    """Print the counts, what is refused, and why the rest fails."""
    for row in table(outcomes, refused):
        print("".join(f"{cell!s:>26}" for cell in row))
    print("\nleft out:")
    for reason, count in collections.Counter(refused.values()).most_common():
        print(f"{count:6}  {reason}")
    causes = collections.defaultdict[str, list[Outcome]](list)
    for outcome in outcomes:
        if not outcome.passed and outcome.id not in refused:
            causes[cause(outcome)].append(outcome)
    print(f"\nwhy the rest fails ({sum(map(len, causes.values()))}):")
    for line, cases in sorted(causes.items(), key=lambda item: -len(item[1]))[:show]:
        print(f"{len(cases):6}  {line}\n        {cases[0].id}")


def cause(outcome: Outcome) -> str:
    """A line that is the same for tests that fail for the same reason."""
    line = " ".join(outcome.why.split())
    line = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "N", line[:220])
    return re.sub(r"(['\"`])(?:(?!\1).){1,60}\1", "'…'", line)


def table(outcomes: list[Outcome], refused: Mapping[str, str]) -> list[list[Any]]:
    """A row per kind of name, the header first."""
    rows: list[list[Any]] = [["tests lean on", "PEFT passes", "left out", "lorica passes", "of the rest"]]
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        left = [outcome for outcome in of_kind if outcome.id not in refused]
        passed = sum(outcome.passed for outcome in left)
        share = f"{passed / len(left):.1%}" if left else ""
        rows.append([ABOUT[kind], len(of_kind), len(of_kind) - len(left), passed, share])
    return rows


def keep(outcomes: list[Outcome], refused: Mapping[str, str]) -> None:
    """Write the tables for the results."""
    header, *rows = table(outcomes, refused)
    counts = collections.Counter(refused.values()).most_common()
    publish(
        "peft_suite",
        title="PEFT's own tests, with lorica's names",
        claim="What PEFT's LoRA tests find, a script that changes its imports finds. Each test imports from "
        "`lorica.peft` in place of `peft`; those that PEFT does not pass offline are left out.",
        tables=[
            {"columns": header, "rows": rows},
            {
                "caption": "Left out: what is refused on purpose, by an error that says what to do instead; "
                "and what PEFT refuses or warns of, and is right here:",
                "columns": ["what, and why", "tests"],
                "rows": [list(row) for row in counts],
            },
        ],
        data=[list(outcome) for outcome in outcomes if not outcome.passed],
        settings={"peft": VERSION, "tests": len(outcomes)},
        device="cpu",
    )


if __name__ == "__main__":
    sys.exit(main())
