#!/usr/bin/env bash
# Checks and times what runs on a GPU, in at most ten minutes: bench/gpu.sh [--device cpu --small, to try the script itself]
#
#   step            LoRA's training step against the frozen base's, in bfloat16 and float32: time and peak memory
#   loss            the chunked loss against all logits: the same gradients, a part of the memory
#   mixed           a batch with an adapter for each row: the outputs of each alone, and the time over the base's
#   compile         torch.compile: the same outputs, and the step's time
#   ddp, fsdp2      where there are two GPUs: the weights of one process with all rows, and the step's time
#   trained         likewise: `lorica train --launch.processes 2` against one process
#
# Prints a line a check, PASS or FAIL with its figures, and writes them to bench/results/gpu.json. Exit status 1 if one failed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
exec timeout 600 "$python" bench/gpu/checks.py "$@"
