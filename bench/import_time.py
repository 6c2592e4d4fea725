"""Start-up: what `import lorica` adds to `import torch`, and how fast the command line answers.

Whole processes, timed from outside.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import harness
import torch

import lorica

STATEMENTS = {
    "import torch": "import torch",
    "import lorica": "import lorica; lorica.adapt, lorica.load",  # which imports its core
    "import peft": "import peft",
    "lorica --version": "from lorica.cli import main; main(['--version'])",
    "lorica --help": "from lorica.cli import main; main(['--help'])",
    "lorica train --help": "from lorica.cli import main; main(['train', '--help'])",
    "lorica info": "from lorica.cli import main; main(['info', '{adapter}'])",
    "all that lorica train imports": "import lorica.train.run",
    "the libraries among it": "import torch, datasets, sklearn.metrics; from transformers import Trainer",
}


def main() -> None:
    """Measure every statement in a fresh interpreter."""
    options = harness.options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(24)))
        lorica.adapt(model, lorica.LoraConfig(target_modules="all-linear"))
        lorica.save(model, folder)
        comparison = harness.alternate(
            "a fresh interpreter",
            {
                name: harness.Contestant(process(code.replace("{adapter}", folder)))
                for name, code in STATEMENTS.items()
            },
            reference="import torch",
            options=options,
        )
    added = comparison.median("import lorica") - comparison.median("import torch")
    harness.publish(
        "import_time",
        title="Start-up",
        claim=f"Seconds that `import lorica` adds to `import torch`: {added:+.2f}.",
        tables=[harness.table([comparison], "")],
        data=harness.seconds([comparison]),
        settings={},
        device=options.device,
        rounds=options.rounds,
    )


def process(code: str) -> harness.Work:
    """Run a statement in a fresh interpreter."""

    def run(_: None) -> None:
        subprocess.run(
            [sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    return run


if __name__ == "__main__":
    main()
