"""A `lorica tune` under Ray that is killed by SIGKILL after its second evaluation is written down."""

from __future__ import annotations

import logging
import os

import ray
from train.killed import nth_call

from lorica.cli import main
from lorica.tune.journal import Journal


def tune_and_die(address: str, arguments: list[str]) -> int:
    """`lorica tune` by a driver of its own, which dies; called in a process of `ranks`.

    Args:
        address: of the Ray that it joins.
        arguments: the command's.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"  # as that Ray's
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    nth_call(Journal, "evaluated", 2, after=True)
    return main(["tune", *arguments])
