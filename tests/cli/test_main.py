from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lorica
from lorica.cli import COMMANDS, main
from lorica.cli.shared.parsing import SHORT, expanded
from lorica.cli.training import train
from lorica.errors import LoricaError
from lorica.train.recipe import from_parsed


def test_help_is_light() -> None:
    """Beyond `import lorica` itself, `lorica --help` imports the command line's own module alone."""
    code = (
        "import json, sys, lorica; before = set(sys.modules); from lorica.cli import main; main(['--help']); "
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "datasets", "jsonargparse", "rich", "torch"} & set(
        json.loads(done.stdout.splitlines()[-1])
    )
    assert all(name in done.stdout for name in COMMANDS)


def test_a_commands_help_is_light() -> None:
    """No command imports torch to explain itself, nor what else takes long."""
    code = (
        "import sys; from lorica.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    main([name, '--help'])\n"
        "    assert not {'torch', 'transformers', 'datasets', 'numpy', 'rich'} & {*sys.modules}, name"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out and what in out for name, what in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lorica {name}")


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help-all"])
    out = " ".join(capsys.readouterr().out.split())
    assert "rows per step on each device. (type: int, default: 16)" in out
    assert "rank of each update; the inner dimension of B·A. At least 1. (type: int, default: 8)" in out
    for name, told in (
        ("predict", "continuations kept in beam search; 1 searches none. A recipe's own default is 1."),
        ("merge", "folder for the merged model; it must be new or empty (required)"),
        ("generate", "prompts (default: standard input, one a line) (type: str"),
    ):
        assert main([name, "--help"]) == 0
        assert told in " ".join(capsys.readouterr().out.split())


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    assert main(["train", "--training.learning_rat", "3"]) == 2
    assert (
        "there is no option --training.learning_rat; did you mean '--training.learning_rate'"
        in capsys.readouterr().err
    )
    assert main(["train", "--training.learning_rate", "fast"]) == 2
    assert "training.learning_rate must be a number or null, not 'fast'" in capsys.readouterr().err
    assert main(["train", "--method.r", "2.5"]) == 2
    assert "method.r must be a whole number, not '2.5'" in capsys.readouterr().err
    assert main(["combine", "a", "b", "--weights", "1,2"]) == 2
    assert "weights element 1 must be a number, not '1,2'" in capsys.readouterr().err
    assert main(["check-serve", "a"]) == 2
    assert "name the server with --for" in capsys.readouterr().err
    assert main(["train", "reviews.csv"]) == 1
    assert "reviews.csv looks like rows, not a recipe; name rows with --data.train" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert main(["info", "one", "two"]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorica {lorica.__version__}\n"


def test_an_error_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["info", str(tmp_path / "nowhere")]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    with pytest.raises(LoricaError):
        main(["--debug", *argv])
    with pytest.raises(LoricaError):
        main([*argv, "--debug"])


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert main(["train"]) == 130


def test_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lorica", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lorica", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("lorica ")


def test_the_help_of_training_fits_a_screen_or_two(capsys: pytest.CaptureFixture[str]) -> None:
    """The options that everybody sets come first, with their short names; every other is named."""
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 100
    assert out.index("--lr, --training.learning_rate") < out.index("all others")
    for action in train.parser()._actions:
        if action.dest not in ("help", *(group for group in ("data", "method", "training", "generation"))):
            assert action.dest.endswith(".help") or action.dest in out, action.dest


def test_short_names_are_the_options_themselves() -> None:
    command = train.parser()
    typed = ["-m", "mine", "-d=rows.csv", "--lr", "1e-3", "--batch_size", "2", "--max-length=9", "-o", "out"]
    typed += ["--method.r", "3", "--method.target_modules", "[q, v]"]
    found = from_parsed(command, command.parse_args(expanded(typed)))
    assert (found.model, found.data.train, found.output) == ("mine", "rows.csv", "out")
    assert (found.training.learning_rate, found.training.batch_size, found.training.max_length) == (
        1e-3,
        2,
        9,
    )
    assert (found.method.r, found.method.target_modules) == (3, ["q", "v"])
    known = {flag for action in command._actions for flag in action.option_strings}
    assert not known & {short for shorts in SHORT.values() for short in shorts}
    assert {f"--{name}" for name in SHORT} <= known


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("merge base adapter out", "'out' is one word too many; what it writes is named by --output"),
        ("merge base adapter", "name what to write with --output"),
        ("combine one two three", "name what to write with --output"),
        ("compress one out --rank 2", "'out' is one word too many; what it writes is named by --output"),
        ("convert one out", "'out' is one word too many; what it writes is named by --output"),
        ("generate one text --out said.jsonl", "there is no option --out: it is --output"),
        ("study one --out=page", "there is no option --out: it is --output"),
        ("tune recipe.yaml --out runs/x", "there is no option --out: it is --output"),
        ("train -r 4", "there is no option -r: it is --method.r"),
        ("train --r=4", "there is no option --r: it is --method.r"),
        ("train --alpha 4", "there is no option --alpha: it is --method.lora_alpha"),
        ("train --targets [q]", "there is no option --targets: it is --method.target_modules"),
        ("plan gpt3 --r 4", "there is no option --r: it is --method.r"),
        (
            "plan gpt3 --target_modules q",
            "there is no option --target_modules: it is --method.target_modules",
        ),
        ("plan gpt3 --task-type SEQ_CLS", "there is no option --task-type: it is --method.task_type"),
        ("plan gpt3 --use_dora true", "there is no option --use_dora: it is --method.use_dora"),
    ],
)
def test_an_old_spelling_names_the_new_one(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", sorted(COMMANDS.keys() - {"chat", "check-serve", "evaluate", "info", "plan", "push", "serve"})
)
def test_every_command_names_what_it_writes_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "-o" in (out := capsys.readouterr().out)
    assert "--output" in out
    assert "--out " not in out


@pytest.mark.parametrize("argv", [["--version"], ["--help"]])
def test_what_needs_no_torch_imports_none(argv: list[str]) -> None:
    code = f"import sys; from lorica.cli import main; main({argv!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_train_says_what_it_does_before_it_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class First:\n"
        "    def write(self, text):\n"
        "        loaded = {'torch', 'transformers', 'datasets'} & {*sys.modules}\n"
        "        print(text, sorted(loaded), file=sys.stderr)\n"
        "        raise SystemExit(3)\n"
        "    def flush(self): ...\n"
        "    encoding, isatty = 'utf-8', lambda self: False\n"
        "sys.stdout = First()\n"
        "from lorica.cli import main\n"
        f"sys.exit(main(['train', '--output', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "loading torch and transformers\n []\n")


def test_a_reader_that_has_read_enough() -> None:
    code = "from lorica.cli import main; import sys; sys.exit(main(['train', '--help']))"
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -u -c "$1" | head -1', sys.executable, code],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)
