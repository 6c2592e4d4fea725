"""The checks of ``bench/gpu.sh``: each compares a GPU path with a plain reference, and times it."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import two_ranks
from llama import decoder, rows_of, step_of
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertModel

import lorica
from lorica.cli import main as main_of_lorica
from lorica.train import Record
from lorica.train.embedded import model_directory
from lorica.train.trainer.loss import LinearHead, chunked_cross_entropy

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Checks:
    """Runs checks, one after the other; what one holds is freed before the next.

    Args:
        device: where to run.
        small: on tiny models, to try the script itself.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        """Nothing has run yet."""
        self.device, self.small = device, small
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, check: Callable[[Checks], dict[str, Any]]) -> None:
        """Run a check: a dictionary of figures, of which ``ok`` says whether it holds."""
        began = time.perf_counter()
        try:
            result = check(self)
        except Exception as error:
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.found[name] = result
        figures = ", ".join(f"{key} {_shown(value)}" for key, value in result.items() if key != "ok")
        print(
            f"{'PASS' if result['ok'] else 'FAIL'}  {name}: {figures} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, works: Mapping[str, Callable[[], object]], turns: int = 20) -> dict[str, float]:
        """Median seconds of several works that take turns."""
        for work in works.values():
            for _ in range(3):
                work()
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(2 if self.small else turns):
            for name, work in works.items():
                self.wait()
                began = time.perf_counter()
                work()
                self.wait()
                taken[name].append(time.perf_counter() - began)
        return {name: statistics.median(each) for name, each in taken.items()}

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], object]) -> float:
        """Largest memory in MiB that a work adds to what is there."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def step(checks: Checks) -> dict[str, Any]:
    """A step of LoRA against a forward and backward of the frozen base."""
    figures: dict[str, Any] = {"ok": True}
    for dtype in (torch.bfloat16, torch.float32):
        base = decoder(checks.device, dtype, small=checks.small)
        base.requires_grad_(False)
        base.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
        ours = lorica.adapt(decoder(checks.device, dtype, small=checks.small), config(), seed=0)
        works = {"base": step_of(base), "lorica": step_of(ours)}
        name = str(dtype).removeprefix("torch.")
        memory = {f"{name} {who} MiB": checks.peak(work) for who, work in works.items()}
        seconds = checks.seconds(works)
        losses = [float(works["lorica"]()) for _ in range(5)]  # type: ignore[arg-type]
        figures |= {f"{name} step over base": seconds["lorica"] / seconds["base"], **memory}
        figures["ok"] &= losses[-1] < losses[0] and all(map(_finite, losses))
    return figures


def loss(checks: Checks) -> dict[str, Any]:
    """The loss without the matrix of logits."""
    tokens, width, classes = (64, 32, 100) if checks.small else (8192, 2048, 128_000)
    draw = torch.Generator(checks.device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw, device=checks.device).requires_grad_()
    weight = torch.randn(classes, width, generator=draw, device=checks.device) / width**0.5
    target = torch.randint(classes, (tokens,), generator=draw, device=checks.device)

    def plain() -> torch.Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(hidden @ weight.t(), target), hidden)[0]

    def chunked() -> torch.Tensor:
        return torch.autograd.grad(chunked_cross_entropy(LinearHead(weight), hidden, target), hidden)[0]

    apart = _apart(chunked(), plain())
    memory = {f"{name} MiB": checks.peak(work) for name, work in (("plain", plain), ("chunked", chunked))}
    seconds = checks.seconds({"plain": plain, "chunked": chunked}, 5)
    less = checks.device.type == "cpu" or memory["chunked MiB"] < memory["plain MiB"] / 2
    return {
        "ok": apart < 1e-3 and less,
        "apart": apart,
        "time over plain": seconds["chunked"] / seconds["plain"],
        **memory,
    }


def mixed(checks: Checks) -> dict[str, Any]:
    """A batch with an adapter for each row."""
    model = decoder(checks.device, torch.float32, small=checks.small).eval()
    names = [f"adapter{i}" for i in range(4 if checks.small else 16)]
    for seed, name in enumerate(names):
        lorica.adapt(model, config(), name, seed=seed)
        shake(model, name, seed)
    batch = rows_of(model, len(names), 8 if checks.small else 64)
    with torch.no_grad():
        with lorica.mixed(model, names):
            together = model(**batch).logits
        alone = []
        for row, name in enumerate(names):
            with lorica.active(model, name):
                alone.append(model(**{key: value[row : row + 1] for key, value in batch.items()}).logits)
        apart = _apart(together, torch.cat(alone))

        def run(chosen: list[str | None]) -> Callable[[], object]:
            def work() -> object:
                with lorica.mixed(model, chosen):
                    return model(**batch)

            return work

        def base() -> Any:
            with lorica.disabled(model):
                return model(**batch)

        moved = _apart(together, base().logits)
        seconds = checks.seconds({"base": base, "mixed": run([*names])})
    return {
        "ok": apart < 1e-3 < moved,
        "apart": apart,
        "base apart": moved,
        "time over base": seconds["mixed"] / seconds["base"],
    }


def compiled(checks: Checks) -> dict[str, Any]:
    """torch.compile of an adapted model."""
    model = lorica.adapt(decoder(checks.device, torch.float32, small=checks.small), config(), seed=0)
    shake(model, "default", 0)
    batch = rows_of(model, 4, 8 if checks.small else 256)
    fast: Any = torch.compile(model)
    with torch.no_grad():
        apart = _apart(fast(**batch).logits, model(**batch).logits)
    works = {"eager": step_of(model, batch), "compiled": step_of(fast, batch)}
    seconds = checks.seconds(works, 10)
    return {"ok": apart < 1e-3, "apart": apart, "step over eager": seconds["compiled"] / seconds["eager"]}


def ddp(checks: Checks) -> dict[str, Any]:
    """Two processes, each with half of the rows, against one with all."""
    return two_ranks.compare("ddp", checks.device, small=checks.small)


def fsdp2(checks: Checks) -> dict[str, Any]:
    """The same, every weight in two parts."""
    return two_ranks.compare("fsdp2", checks.device, small=checks.small)


def trained(checks: Checks) -> dict[str, Any]:
    """`lorica train` in two processes against one with batches twice as large."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        BertModel.from_pretrained(model_directory(), **without).save_pretrained(place / "model")
        AutoTokenizer.from_pretrained(model_directory()).save_pretrained(place / "model")
        steps = "4" if checks.small else "30"
        given = ["train", "-m", str(place / "model"), "--data.train_rows", "500", "--max-steps", steps]
        given += ["--data.validation_rows", "50", "--data.test_rows", "50", "--training.report_to", "[]"]
        for processes, batch in ((1, 16), (2, 8)):
            more = ["-b", str(batch), "-o", str(place / str(processes)), "--training.load_best", "false"]
            more += ["--launch.processes", "2"] if processes == 2 else []
            if main_of_lorica([*given, *more]) != 0:
                return {"ok": False, "failed in processes": processes}
        ours, theirs = (load_file(place / name / "adapter_model.safetensors") for name in ("2", "1"))
        records = [Record.load(place / name) for name in ("2", "1")]
    apart = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
    largest = max(float(value.abs().max()) for value in theirs.values())
    seconds = [float(record.results["step_seconds"]) for record in records]
    return {
        "ok": apart / largest < 1e-2,
        "apart": apart / largest,
        "step, two over one": seconds[0] / seconds[1],
    }


def config() -> lorica.LoraConfig:
    """LoRA on every linear layer of the blocks."""
    return lorica.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)


@torch.no_grad()
def shake(model: nn.Module, name: str, seed: int) -> None:
    """Let an adapter's B leave zero, as training would."""
    draw = torch.Generator("cpu").manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f"lora_B.{name}." in path:
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw).to(parameter)


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest distance, over the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run the checks that this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--only", nargs="*", help="names of the checks to run (default: all)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu --small tries the script itself")
        return 1
    checks = Checks(device, small=options.small)
    several = device.type == "cpu" or torch.cuda.device_count() >= 2
    every = (step, loss, mixed, compiled, *((ddp, fsdp2, trained) if several else ()))
    for check in (each for each in every if options.only is None or each.__name__ in options.only):
        checks.run(check.__name__, check)
    if not several:
        print("SKIP  ddp, fsdp2, trained: there is one GPU")
    if device.type == "cuda" and options.only is None:
        about = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "torch": torch.__version__,
        }
        RESULTS.write_text(json.dumps({"machine": about, "checks": checks.found}, indent=2) + "\n")
    return int(not all(result["ok"] for result in checks.found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
