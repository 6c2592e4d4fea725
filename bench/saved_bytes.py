"""Memory that a training step keeps for its backward pass, as autograd's own hooks count it."""

from __future__ import annotations

import harness
import torch
from models import LORALIB, PEERS
from shapes import BERT, GPT2, LLAMA, MINILM, VIT
from torch import Tensor, nn

R = 8
SHAPES = (MINILM, BERT, LLAMA, GPT2, VIT)
SETTINGS = {
    "float32, dropout 0": (torch.float32, 0.0),
    "float32, dropout 0.1": (torch.float32, 0.1),
    "bfloat16 base, float32 adapters, dropout 0": (torch.bfloat16, 0.0),
    "bfloat16 base, float32 adapters, dropout 0.1": (torch.bfloat16, 0.1),
}
FULL, REFERENCE, OWN = "full fine-tuning", "PEFT", "lorica"


def main() -> None:
    """Count for every model under every setting."""
    options = harness.options(__doc__)
    tables, data = [], {}
    for shape in SHAPES:
        counts: dict[str, dict[str, int]] = {}
        for setting, (dtype, dropout) in SETTINGS.items():
            counts[setting] = {}
            for name in (FULL, *PEERS):
                if name == LORALIB and (dtype != torch.float32 or not shape.replaceable):
                    continue  # its factors are in the base's dtype or its products do not run
                model = shape.make().to(options.device, dtype)
                if name != FULL:
                    model = PEERS[name](model, shape.linear, r=R, dropout=dropout)
                batch = shape.batch(model, shape.rows, shape.length)
                counts[setting][name] = saved(model.train(), batch)
            print(f"{shape.name}, {setting}: {counts[setting]}", flush=True)
        names = [FULL, *PEERS]
        rows = [[s, *(_cell(c, name) for name in names)] for s, c in counts.items()]
        caption = f"{shape.name}, {shape.rows} × {shape.length} tokens"
        tables.append({"caption": caption, "columns": ["", *names], "rows": rows})
        data[shape.name] = counts
    ratios = {
        setting: [counts[setting][OWN] / counts[setting][REFERENCE] for counts in data.values()]
        for setting in SETTINGS
    }
    ranges = [f"{setting} {min(found):.2f} to {max(found):.2f}" for setting, found in ratios.items()]
    harness.publish(
        "saved_bytes",
        title="Memory kept for the backward pass",
        claim=(
            "Bytes that autograd keeps between forward and backward of one all-linear step, each block "
            "of memory once and parameters left out. The models' own dropout is off. Ratios are to PEFT; "
            f"lorica's: {'; '.join(ranges)}."
        ),
        tables=tables,
        data=data,
        settings={"r": R},
        device=options.device,
    )


def saved(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes kept for the backward pass of one step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).last_hidden_state[:, 0].float().square().mean()
    loss.backward()
    return sum(kept.values())


def _cell(counts: dict[str, int], name: str) -> str:
    if name not in counts:
        return ""
    cell = f"{counts[name] / 2**20:.1f} MiB"
    return cell if name == REFERENCE else f"{cell} ({counts[name] / counts[REFERENCE]:.2f}×)"


if __name__ == "__main__":
    main()
