"""``lorica combine``: several adapters into one."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser, add_output, output_of


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "combine",
        description="Make one adapter of several for the same base, and print how far it is from their "
        "weighted sum. No model is loaded.",
    )
    result.add_argument("adapters", type=str, nargs="+", help="folders with the adapters, lorica's or PEFT's")
    add_output(result, "folder for the combination; it must be new or empty", required=True)
    result.add_argument(
        "--weights",
        type=float,
        nargs="+",
        help="a number for each adapter, of either sign (default: 1 for each)",
    )
    result.add_argument(
        "--method",
        type=str,
        default="sum",
        help="sum (or cat): the weighted sum itself, ranks add up; svd: the sum cut to --rank; linear: "
        "PEFT's, which keeps the rank and is not the sum; magnitude-prune, ties, dare-linear, dare-ties: as "
        "linear, on pruned factors; these with -svd: on the products, cut to --rank",
    )
    result.add_argument(
        "--density",
        type=float | None,
        help="share of elements to keep, in (0, 1]; the pruning methods need it",
    )
    result.add_argument(
        "--majority_sign_method",
        type=str | None,
        help="ties and dare-ties: total (the sum decides a sign; default) or frequency (most adapters do)",
    )
    result.add_argument(
        "--rank",
        type=int | None,
        help="svd and -svd: rank of each layer, at most (default: the highest of the adapters)",
    )
    result.add_argument(
        "--clamp",
        type=float | None,
        help="svd and -svd: quantile in (0, 1] to which larger elements of the factors are brought "
        "(default: none are)",
    )
    result.add_argument("--seed", type=int | None, help="of what dare drops (default: another each time)")
    result.add_argument(
        "--keep",
        type=str | None,
        help="which of the adapters' folders the head, biases and task come from, where they differ",
    )
    return result


def run(argv: list[str]) -> int:
    """Combine, save, and say how far the result is from the sum."""
    command = parser()
    parsed: Any = command.parse_args(argv)

    from lorica.algebra import combine, error
    from lorica.checkpoint import read
    from lorica.cli.shared.made import check_new, save_and_show, warnings_in_a_line
    from lorica.errors import ConfigError, listing

    out = check_new(output_of(command, parsed))
    if parsed.keep is not None and parsed.keep not in parsed.adapters:
        raise ConfigError(f"--keep must be one of {listing(map(repr, parsed.adapters))}, not {parsed.keep!r}")
    keep = None if parsed.keep is None else parsed.adapters.index(parsed.keep)
    adapters = [read(folder) for folder in parsed.adapters]
    method = parsed.method.replace("-", "_")
    with warnings_in_a_line():
        adapter = combine(
            adapters,
            parsed.weights,
            "cat" if method == "sum" else method,
            density=parsed.density,
            majority_sign_method=parsed.majority_sign_method,
            svd_rank=parsed.rank,
            svd_clamp=parsed.clamp,
            seed=parsed.seed,
            keep=keep,
        )
    first = 0 if keep is None else keep
    order = [parsed.adapters[first], *parsed.adapters[:first], *parsed.adapters[first + 1 :]]
    report = error(adapter, adapters, parsed.weights)
    save_and_show(adapter, report, out, "the weighted sum", of=order if keep is None else order[:1])
    return 0
