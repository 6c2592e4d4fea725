"""``lorica plan``: the cost of training, before it begins."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorica.cli.shared.parsing import Parser, add_trust, expanded
from lorica.errors import ConfigError, nearest
from lorica.plain import as_json

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT = {
    "--batch": "--training.batch_size",
    "--length": "--training.max_length",
}
# What PEFT calls each kind of model → the task that trains one.
_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}


def parser() -> Parser:
    """The command's options: those of `lorica train`, and more that a plan needs."""
    from lorica.train.recipe import add_recipe

    result = Parser(
        "plan",
        usage="lorica plan [MODEL | RECIPE.yaml] [any option of lorica train] "
        "[--method lora|full|qlora|all] ... [--fit GB]",
        description="Parameters, checkpoint, memory and arithmetic of a training step that `lorica train` "
        "with the same options would make: the same model, head, targets and batch. From the model's "
        "configuration; no weight is loaded. gpt3 stands for GPT-3's shape.",
    )
    add_recipe(result)
    add = result.add_argument
    add(
        "--dtype",
        type=str,
        default="auto",
        help=f"of weights: {', '.join(_DTYPES)}; auto: as the model is loaded",
    )
    add("--optimizer", type=str, default="adamw", help="adamw, sgd or momentum")
    add("--checkpointing", action="store_true", help="short for --training.gradient_checkpointing true")
    add("--fit", type=float | None, metavar="GB", help="find the largest batch that fits, in 10^9 bytes")
    add("--ranks", type=int | None, metavar="N", help="say what each of N ranks would hold, by engine")
    add("--modules", action="store_true", help="say which modules would be adapted or trained whole, instead")
    add("--json", action="store_true", help="print JSON")
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Plan, and print it."""
    if {"-h", "--help"} & {*argv}:
        _print_help()
        return 0
    argv, method = _without_method(expanded(argv, _SHORT))
    argv = ["--help" if argument == "--help-all" else argument for argument in argv]
    model = None
    if argv and not argv[0].startswith("-"):
        model, *argv = argv
        if model != "gpt3":
            recipe = model.endswith((".yaml", ".yml"))
            argv = ["--config" if recipe else "--model", model, *argv]
    command = parser()
    targets = any(argument.startswith("--method.target_modules") for argument in argv)
    parsed: Any = command.parse_args(argv)
    if parsed.dtype not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}{nearest(parsed.dtype, _DTYPES)}")

    typed = any(argument.removeprefix("--task=") == parsed.task for argument in argv)
    parsed.trust_task = parsed.trust_task or typed  # by nobody but the user
    if parsed.modules:
        return _show_modules(command, parsed, model, usual_targets=not targets)
    plans = _plans(command, parsed, model, method, usual_targets=not targets)
    each = [p.on_ranks(parsed.ranks) if parsed.ranks is not None else {} for p in plans]
    if parsed.json:
        found = [{**p.to_dict(), "memory": p.memory} for p in plans]
        if parsed.ranks is not None:
            found = [{**plan, "ranks": engines} for plan, engines in zip(found, each, strict=True)]
        print(as_json(found if method == "all" else found[0]))
    else:
        texts = [f"{p.method}\n{p}{_on_ranks(parsed.ranks, e)}" for p, e in zip(plans, each, strict=True)]
        print("\n\n".join(texts))
    return 0


def _on_ranks(ranks: int | None, engines: dict[str, int]) -> str:
    """The memory of each rank, a line per engine."""
    if not engines:
        return ""
    from lorica.train.console import size

    lines = [f"  {engine:<10} {size(held)}" for engine, held in engines.items()]
    return "\n".join([f"\non each of {ranks} ranks, each with this batch:", *lines])


def _show_modules(command: Parser, parsed: Any, model: str | None, *, usual_targets: bool) -> int:
    """Print the changes that the recipe's method makes to its model."""
    recipe = _recipe(command, parsed)
    if model == "gpt3":
        from lorica.study.planning import GPT3, preview

        found = preview(GPT3, _config_of_gpt3(recipe, usual_targets=usual_targets))
    else:
        from lorica.train.plan import preview_recipe

        found = preview_recipe(recipe)
    print(as_json(dataclasses.asdict(found)) if parsed.json else found)
    return 0


def _recipe(command: Parser, parsed: Any) -> Any:
    """The recipe that the options stand for, with what only a plan has a word for."""
    from lorica.train.recipe import check_trusted, from_parsed

    recipe = from_parsed(command, parsed)
    check_trusted(recipe.code(), "the recipe", trust_task=parsed.trust_task)
    if (kind := recipe.method.task_type) is not None and kind != "FEATURE_EXTRACTION":
        recipe = recipe.replace(task=_TASKS[kind])
    if parsed.checkpointing:
        recipe = recipe.replace(training={"gradient_checkpointing": True})
    return recipe


def _plans(
    command: Parser, parsed: Any, model: str | None, method: str | None, *, usual_targets: bool
) -> list[Any]:
    import torch

    from lorica.train.plan import plan_recipe

    methods = ("full", "lora", "qlora") if method == "all" else (method,)
    dtype = None if parsed.dtype == "auto" else getattr(torch, parsed.dtype)
    recipe = _recipe(command, parsed)
    if model == "gpt3":
        config = _config_of_gpt3(recipe, usual_targets=usual_targets)
        return [_of_gpt3(recipe, config, parsed, each or "lora", dtype or torch.float32) for each in methods]
    return [
        plan_recipe(recipe, method=each, gigabytes=parsed.fit, dtype=dtype, optimizer=parsed.optimizer)
        for each in methods
    ]


def _config_of_gpt3(recipe: Any, *, usual_targets: bool) -> Any:
    """A recipe's LoRA for a language model; its usual targets are the paper's, query and value."""
    config = recipe.method.replace(task_type="CAUSAL_LM")
    return config.replace(target_modules=None) if usual_targets else config


def _of_gpt3(recipe: Any, config: Any, parsed: Any, method: str, dtype: Any) -> Any:
    """The plan of the paper's largest model, of which nobody has the weights: no recipe trains it."""
    from lorica.study.planning import GPT3, largest_batch, plan

    options: dict[str, Any] = {
        "method": method,
        "length": recipe.training.max_length,
        "dtype": dtype,
        "optimizer": parsed.optimizer,
        "checkpointing": parsed.checkpointing or recipe.training.gradient_checkpointing,
    }
    if parsed.fit is not None:
        return largest_batch(GPT3, parsed.fit, config, **options)
    return plan(GPT3, config, batch=recipe.training.batch_size, **options)


def _without_method(argv: list[str]) -> tuple[list[str], str | None]:
    """Take ``--method NAME`` out, whose name is also that of a part of the recipe."""
    found, rest, waiting = None, [], False
    for argument in argv:
        if waiting:
            found, waiting = argument, False
        elif argument == "--method":
            waiting = True
        elif argument.startswith("--method="):
            found = argument.partition("=")[2]
        else:
            rest.append(argument)
    known = ("lora", "full", "qlora", "all")
    if waiting or (found is not None and found not in known):
        raise ConfigError(f"--method must be one of {', '.join(known)}, not {found}")
    return rest, found


def _print_help() -> None:
    from lorica.cli.shared.parsing import first_sentence

    command = parser()
    print(f"usage: {command.usage}\n\n{command.description}\n")
    print("  --method NAME           lora, full, qlora, or all three (default: as the recipe says)")
    for action in command._actions:
        if action.dest in ("dtype", "optimizer", "checkpointing", "fit", "ranks", "modules", "json"):
            name = f"{action.option_strings[0]} {action.metavar or ''}".strip()
            print(f"  {name:<23} {first_sentence(str(action.help))}")
    print("\nand those of `lorica train --help`, such as --method.r, --task, --batch-size (or --batch)")
    print("and --max-length (or --length); `lorica plan --help-all` shows every one")
