"""Peak memory of DPO: lorica's reference, PEFT's, and a copied one; each in a process of its own.

    python bench/dpo_memory.py

A Llama of 101 million parameters in float32, all linear layers adapted, 3 steps of 2 pairs of 48 tokens,
activations recomputed (TRL's default).

    lorica          the adapter's own start: A and B are exchanged on the same base
    peft            the adapter switched off
    peft, trained   a second adapter, as TRL adds it for one that was trained before
    copied          a second base, which TRL takes as `ref_model`

The figure is the peak of the process in training, less what it held before its model was made (its imports).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import publish

KINDS = ("lorica", "peft", "peft, trained", "copied")


def anonymous(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def model() -> Any:
    """The policy."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 13}
    return LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=12, vocab_size=1000, pad_token_id=0, eos_token_id=1)
    )


def tokenizer() -> Any:
    """Words that are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[END]": 1, "[UNK]": 2, **{str(number): number for number in range(3, 1000)}}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )


def run(kind: str) -> dict[str, Any]:
    """Train, in this process."""
    import os

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    import trl
    from datasets import Dataset

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(str(n) for n in torch.randint(3, 1000, (count,), generator=draw).tolist())

    rows = [{"prompt": words(16), "chosen": " " + words(32), "rejected": " " + words(32)} for _ in range(8)]
    kinds = trl.DPOTrainer, trl.DPOConfig
    __import__("lorica.model" if kind == "lorica" else "peft")
    imports = anonymous("VmRSS")
    policy = model()
    parameters = sum(p.numel() for p in policy.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    more: dict[str, Any] = {}
    if kind == "lorica":
        import lorica

        lorica.adapt(policy, lorica.LoraConfig(r=8, target_modules=targets), seed=0)
    else:
        import peft

        config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
        if kind == "peft":
            more["peft_config"] = config
        else:
            policy = peft.get_peft_model(policy, config)
        if kind == "copied":
            more["ref_model"] = model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = kinds[0](
            model=policy,
            args=kinds[1](
                folder,
                per_device_train_batch_size=2,
                max_steps=3,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            **more,
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = anonymous("VmHWM") - imports
    return {"kind": kind, "parameters": parameters, "peak": peak, "imports": imports, "losses": losses}


def main() -> None:
    """Run each kind, and print the ratios."""
    if len(sys.argv) > 1:
        print("RESULT " + json.dumps(run(sys.argv[1])))
        return
    found = {}
    for kind in KINDS:
        done = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        found[kind] = json.loads(line.removeprefix("RESULT "))
    report(found)


def report(found: dict[str, Any]) -> None:
    """Write the result."""
    copied = found["copied"]["peak"]
    publish(
        "dpo_memory",
        title="Peak memory of DPO",
        claim="What a process holds at most in three steps of TRL's DPOTrainer, less its imports. lorica's "
        "reference is the adapter's start on the same base; ratios are to a second base as the reference.",
        tables=[
            {
                "columns": ["reference", "peak", "ratio"],
                "rows": [
                    [kind, f"{facts['peak'] / 2**20:,.0f} MiB", f"{facts['peak'] / copied:.2f}×"]
                    for kind, facts in found.items()
                ],
            }
        ],
        data=found,
        settings={"parameters": "101 million", "pairs a batch": 2, "tokens a row": 48, "r": 8},
        device="cpu",
    )


if __name__ == "__main__":
    main()
