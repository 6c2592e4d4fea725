"""``lorica init``: five questions, and a recipe with comments that answers to them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.cli.shared import hints
from lorica.cli.shared.parsing import Parser
from lorica.errors import ConfigError, FileError, LoricaError, nearest

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("two thin matrices beside each linear layer; a good first choice", {}),
    "dora": ("direction and size apart: often better at small ranks, a little slower", {"use_dora": True}),
    "rslora": ("scaled by the root of the rank, for large ranks", {"use_rslora": True}),
    "pissa": ("starts from the weights' largest singular directions", {"init_lora_weights": "pissa"}),
    "qlora": ("the base packed to four bits; needs lorica[quantized]", {}),
}
"""Method → what it is, and the fields of a recipe's ``method`` that it sets."""

SIZES: Mapping[str, tuple[str, int]] = {
    "small": ("rank 8: a style, a label, a format", 8),
    "medium": ("rank 16: a task with rules of its own", 16),
    "large": ("rank 64: much that is new, many rows", 64),
}
"""Size → what it is for, and the rank."""

TASKS = {
    "sequence-classification": "a class for a text or a pair of texts",
    "multi-label-classification": "several classes for a text",
    "regression": "a number for a text or a pair of texts",
    "token-classification": "a class for each word",
    "question-answering": "the place in a text that answers a question",
    "image-classification": "a class for an image",
    "causal-lm": "instructions, conversations, or raw text",
    "seq2seq-lm": "a text made of another, by an encoder and a decoder",
    "preference": "to give the better of two answers (DPO, KTO and others; needs lorica[post])",
    "reward": "a number for an answer, from pairs of a better and a worse one (needs lorica[post])",
    "grpo": "answers that have more reward, of your own function or model (needs lorica[post])",
    "rloo": "the same by another comparison of answers (needs lorica[post])",
}

_WRITES = ("causal-lm", "seq2seq-lm")
_SAMPLES = ("grpo", "rloo")
_ANSWERS = ("preference", "reward", *_SAMPLES)

_POST: Mapping[str, tuple[str, ...]] = {
    "preference": (
        "  loss: sigmoid  # DPO; kto for answers that were judged alone; simpo and orpo need no reference",
        "  beta: 0.1  # pull towards how the adapter began",
    ),
    "grpo": (
        "  # rewards: [rewards.py:score]  # def score(prompts, completions, **columns): a number for each",
        "  generations: 8  # answers to a prompt, compared with one another",
        "  max_new_tokens: 64",
    ),
}
"""Task → lines of a recipe's ``post``."""


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        name: of the option that answers it.
        text: the question.
        default: value without an answer.
        choices: answers and their meanings; None where any text is one.
    """

    name: str
    text: str
    default: str
    choices: Mapping[str, str] | None = None

    def checked(self, answer: str) -> str:
        """An answer, by its name or its number.

        Raises:
            ConfigError: it is none of the choices.
        """
        if self.choices is None:
            return answer
        names = list(self.choices)
        if answer.isdecimal() and 0 < int(answer) <= len(names):
            return names[int(answer) - 1]
        if answer not in names:
            raise ConfigError(
                f"--{self.name} must be one of {', '.join(names)}, not {answer!r}{nearest(answer, names)}"
            )
        return answer


QUESTIONS = (
    Question(
        "model",
        "Which pretrained model? A folder, or a name on the Hugging Face Hub.",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    Question("task", "What is to be learned?", "sequence-classification", TASKS),
    Question(
        "data",
        "Where are the rows? A file, a folder, a Hub name, or docstrings (a set that comes with lorica).",
        "docstrings",
    ),
    Question("method", "By which method?", "lora", {name: text for name, (text, _) in METHODS.items()}),
    Question(
        "size", "How much is to be learned?", "small", {name: text for name, (text, _) in SIZES.items()}
    ),
)


def parser() -> Parser:
    """The command's options: an answer to each question."""
    result = Parser(
        "init",
        usage="lorica init [-m MODEL] [-t TASK] [-d ROWS] [--method METHOD] [--size SIZE] [-o RECIPE.yaml]",
        description="Asks five questions and writes a recipe with comments, for lorica train. What an "
        "option answers is not asked; where the input is no terminal, and nobody can be, defaults hold.",
    )
    add = result.add_argument
    add("-m", "--model", type=str | None, help="the pretrained model: a folder or a Hub name")
    add("-t", "--task", type=str | None, help=f"what is learned: {', '.join(TASKS)}")
    add("-d", "--data", type=str | None, help="the rows: a file, a folder, a Hub name, or docstrings")
    add("--method", type=str | None, help=f"how: {', '.join(METHODS)}")
    add("--size", type=str | None, help=f"how much is to be learned: {', '.join(SIZES)}")
    add("-o", "--output", type=str, default="recipe.yaml", help="the recipe to write")
    add("--overwrite", action="store_true", help="replace a recipe that is there")
    return result


def run(argv: list[str]) -> int:
    """Ask, write the recipe, and print the next commands."""
    command = parser()
    parsed: Any = command.parse_args(argv)
    path = Path(parsed.output)
    if path.exists() and not parsed.overwrite:
        raise FileError(f"{path} is there already; name another with --output, or say --overwrite")
    given = {question.name: parsed[question.name] for question in QUESTIONS}
    answers = ask(given, input if sys.stdin.isatty() else None)

    from lorica.train.recipe import Recipe
    from lorica.train.system import write_atomically

    text = recipe_text(answers, _found(answers), str(path))
    import yaml

    Recipe.from_dict(yaml.safe_load(text), str(path))  # what is written can be trained
    write_atomically(path, text)
    print(f"wrote {path}")
    reward = ("--reward", "rewards.py:score") if answers["task"] in _SAMPLES else ()
    hints.show(hints.command("data", path), hints.command("train", path, *reward))
    return 0


def ask(given: Mapping[str, str | None], asked: Callable[[str], str] | None) -> dict[str, str]:
    """The answers to all questions.

    Args:
        given: question → answer that is known already, or None.
        asked: asks a person, as `input` does; None takes defaults, and says so.

    Raises:
        ConfigError: a given answer is none of the choices; or the person left before the last question.
    """
    found: dict[str, str] = {}
    for question in QUESTIONS:
        answer = given.get(question.name)
        if answer is not None:
            found[question.name] = question.checked(answer)
        elif asked is None:
            print(f"{question.name}: {question.default} (--{question.name} gives another)")
            found[question.name] = question.default
        else:
            found[question.name] = _asked(question, asked)
    return found


def _asked(question: Question, asked: Callable[[str], str]) -> str:
    print(f"\n{question.text}")
    for number, (name, meaning) in enumerate((question.choices or {}).items(), 1):
        print(f"  {number}. {name}: {meaning}")
    while True:
        try:
            answer = asked(f"[{question.default}] ").strip() or question.default
        except EOFError:
            raise ConfigError(
                f"the input ended before the question for the {question.name}; give --{question.name}"
            ) from None
        try:
            return question.checked(answer)
        except ConfigError as error:
            print(error)


def _found(answers: Mapping[str, str]) -> str | None:
    """The form of the rows for the task, in a line, where they are on this machine.

    Raises:
        LoricaError: they cannot be read, or do not fit the task.
    """
    source = answers["data"]
    if not Path(source.rpartition("#")[0] or source).expanduser().exists():
        return None  # on the Hub; training says what it finds there

    from lorica.train import prepared
    from lorica.train.console import quiet
    from lorica.train.recipe import Recipe

    recipe = Recipe(task=answers["task"], model=answers["model"]).replace(data={"train": source})
    try:
        with quiet():
            recipe, task, used = prepared.read(recipe)
    except LoricaError as error:
        raise type(error)(f"{error}\n(--data gives other rows, --task another task)") from error
    columns = " + ".join(task.inputs(recipe.data))
    label = recipe.data.label or ", ".join(recipe.data.labels or [])
    rows = ", ".join(f"{len(part.rows):,} {name}" for name, part in used.items())
    return f"found: {columns}{f' → {label}' if label else ''}; {rows} rows"


def recipe_text(answers: Mapping[str, str], found: str | None, path: str) -> str:
    """The recipe, as YAML with comments.

    Args:
        answers: question → answer.
        found: form of the rows, in a line; None where it is not known.
        path: of the file, for the commands in it.
    """
    task, method = answers["task"], answers["method"]
    rank, writes = SIZES[answers["size"]][1], task in _WRITES
    file = shlex.quote(path)
    long = writes or task in _ANSWERS
    batch, gathered = (16, 4) if task in _SAMPLES else (4, 4) if long else (16, 1)
    post = _POST.get("grpo" if task in _SAMPLES else task, ())
    lines = [
        f"# lorica data {file}     what will be learned, as the model will see it",
        f"# lorica plan {file}     what that will cost",
        f"# lorica train {file}    training; --resume goes on after a stop",
        "# Each field can be given on the command line too, such as --training.epochs 1.",
        "",
        f"task: {task}  # {TASKS[task]}",
        f"model: {_scalar(answers['model'])}",
        *(["quantization: nf4  # the base in four bits a weight"] if method == "qlora" else []),
        "",
        "data:",
        f"  train: {_scalar(answers['data'])}",
        *([f"  # {found}"] if found else []),
        "  # validation: dev.jsonl  # without it, and without a split of that name:",
        "  validation_fraction: 0.1  # a tenth of the training rows chooses the best checkpoint",
        "  # text: COLUMN  # columns, where their names are not the usual ones",
        *(["  # chosen: COLUMN", "  # rejected: COLUMN"] if task in ("preference", "reward") else []),
        *([] if task in ("reward", *_SAMPLES) else ["  # label: COLUMN"]),
        *(["  # template: 'Q: {question} A: {answer}'  # rows of any other form"] if writes else []),
        "",
        f"method:  # {method}: {METHODS[method][0]}",
        f"  r: {rank}  # {answers['size']}: {SIZES[answers['size']][0].partition(': ')[2]}",
        f"  lora_alpha: {2 * rank}  # the update counts alpha / r times",
        "  target_modules: all-linear",
        *(f"  {name}: {_scalar(value)}" for name, value in METHODS[method][1].items()),
        "  lora_dropout: 0.0  # 0.05 to 0.1 where few rows are learned by heart",
        "",
        "training:",
        "  # learning_rate: 2e-4  # chosen by the model's width where it is left out",
        "  # epochs: 3  # as many as few rows need, where it is left out",
        f"  batch_size: {batch}{'  # answers; a multiple of generations' if task in _SAMPLES else ''}",
        f"  gradient_accumulation: {gathered}  # batches a step",
        f"  max_length: {512 if long else 128}  # tokens; longer rows are cut, which is told",
        *(["  # packing: true  # short rows share a sequence"] if task == "causal-lm" else []),
        "  seed: 0",
        *(["", "generation:", "  # metrics: [rouge]  # scores of what the model writes"] if writes else []),
        *(["  max_new_tokens: 64"] if writes else []),
        *(["", "post:", *post] if post else []),
        "",
        f"output: {_scalar(f'runs/{Path(path).stem}')}  # the adapter, run.json, checkpoints",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value as YAML writes it on one line."""
    import yaml

    text = yaml.safe_dump(value, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
