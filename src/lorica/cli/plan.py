"""``lorica plan``: what training will cost, before it begins."""

from __future__ import annotations

from typing import Any

from lorica.cli.parsing import Parser
from lorica.plain import as_json

_DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "plan",
        description="Parameters, checkpoint, memory and arithmetic of a training step, from the model's "
        "configuration alone. No weight is loaded.",
    )
    add = result.add_argument
    add("model", type=str, help="the model: a folder with config.json, a Hub name, or gpt3")
    add("--method", type=str, default="lora", help="lora, full, qlora, or all three (default: lora)")
    add("--r", type=int, default=8, help="rank (default: 8)")
    text = "name of the modules to adapt, or all-linear (default: the attention's query and value)"
    add("--target_modules", action="append", metavar="NAME", help=text)
    add("--task_type", type=str, default=None, help="SEQ_CLS, CAUSAL_LM, ... (default: the model's own head)")
    add("--batch", type=int, default=8, help="rows of a step (default: 8)")
    add("--length", type=int, default=128, help="tokens of a row (default: 128)")
    add("--dtype", type=str, default="float32", help=f"of weights: {', '.join(_DTYPES)} (default: float32)")
    add("--optimizer", type=str, default="adamw", help="adamw, sgd or momentum (default: adamw)")
    add("--checkpointing", action="store_true", help="blocks keep their inputs alone and are computed again")
    add("--fit", type=float | None, metavar="GB", help="find the largest batch that fits, in 10^9 bytes")
    add("--json", action="store_true", help="print JSON")
    return result


def run(argv: list[str]) -> int:
    """Plan, and print it."""
    parsed: Any = parser().parse_args(argv)

    import torch

    from lorica.config import LoraConfig
    from lorica.errors import ConfigError, nearest
    from lorica.study.planning import GPT3, largest_batch, plan

    if parsed.dtype not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}{nearest(parsed.dtype, _DTYPES)}")
    targets = parsed.target_modules
    task = parsed.task_type or ("CAUSAL_LM" if parsed.model == "gpt3" else None)
    config = LoraConfig(
        r=parsed.r,
        lora_alpha=parsed.r,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type=task,
    )
    model: Any = GPT3 if parsed.model == "gpt3" else parsed.model
    settings: dict[str, Any] = {
        "length": parsed.length,
        "dtype": getattr(torch, parsed.dtype),
        "optimizer": parsed.optimizer,
        "checkpointing": parsed.checkpointing,
    }
    plans = []
    for method in ("full", "lora", "qlora") if parsed.method == "all" else (parsed.method,):
        if parsed.fit is not None:
            plans.append(largest_batch(model, parsed.fit, config, method=method, **settings))
        else:
            plans.append(plan(model, config, method=method, batch=parsed.batch, **settings))
    if parsed.json:
        found = [{**p.to_dict(), "memory": p.memory} for p in plans]
        print(as_json(found if parsed.method == "all" else found[0]))
    else:
        print("\n\n".join(f"{p.method}\n{p}" for p in plans))
    return 0
