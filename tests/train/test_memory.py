from __future__ import annotations

import subprocess
import sys

import pytest
import torch

PARENT = """
import subprocess, sys
ballast = bytearray(600_000_000)
print(subprocess.check_output([sys.executable, "-c", sys.argv[1]], text=True))
"""
CHILD = "from lorica.train.system import peak_memory; print(peak_memory())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is its own")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_is_not_charged_for_what_its_parent_had() -> None:
    alone, child = (
        int(subprocess.check_output([sys.executable, "-c", *argv], text=True))
        for argv in ([CHILD], [PARENT, CHILD])
    )
    assert child < alone + 200_000_000
