"""A `lorica tune` under Ray that is killed by SIGKILL after its second evaluation is written down.

Run as a program by test_on_ray.py: ``python killed_on_ray.py ARGUMENTS``, those of `lorica tune`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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

if __name__ == "__main__":
    ray.init(**CLUSTER)
    nth_call(Journal, "evaluated", 2, after=True)
    sys.exit(main(["tune", *sys.argv[1:]]))
