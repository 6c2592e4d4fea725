"""A Ray for tests, and a `lorica tune` under it that is killed after its second evaluation."""

from __future__ import annotations

from typing import Any

import ray
from train.killed import nth_call

from lorica.cli import main
from lorica.tune.journal import Journal

CLUSTER: dict[str, Any] = {
    "num_cpus": 2,
    "include_dashboard": False,
    "object_store_memory": 80 * 2**20,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


def tune_and_die(address: str, arguments: list[str]) -> int:
    """`lorica tune` by a driver of its own, which dies; called in a process of `ranks`.

    Args:
        address: of the Ray that it joins.
        arguments: the command's.
    """
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    nth_call(Journal, "evaluated", 2, after=True)
    return main(["tune", *arguments])
