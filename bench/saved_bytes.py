"""Memory that a training step keeps for its backward pass, as autograd's own hooks count it."""

from __future__ import annotations

import harness
import torch
from models import ALL_LINEAR, MODELS, PEERS, in_dtype, tokens
from torch import Tensor, nn

ROWS, LENGTH, R = 16, 64, 8
SETTINGS = {
    "float32, dropout 0": (torch.float32, 0.0),
    "float32, dropout 0.1": (torch.float32, 0.1),
    "bfloat16 base, float32 adapters, dropout 0": (torch.bfloat16, 0.0),
    "bfloat16 base, float32 adapters, dropout 0.1": (torch.bfloat16, 0.1),
}
FULL, REFERENCE = "full fine-tuning", "PEFT"


def main() -> None:
    """Count for every model under every setting."""
    options = harness.options(__doc__)
    tables, data = [], {}
    for model_name, make in MODELS.items():
        counts: dict[str, dict[str, int]] = {}
        for setting, (dtype, dropout) in SETTINGS.items():
            models: dict[str, nn.Module] = {FULL: in_dtype(make, dtype)}
            for name, adapt in PEERS.items():
                if name == "loralib" and dtype != torch.float32:
                    continue  # its factors are in the base's dtype or its products do not run
                models[name] = adapt(in_dtype(make, dtype), ALL_LINEAR, r=R, dropout=dropout)
            counts[setting] = {
                name: saved(model.to(options.device).train()) for name, model in models.items()
            }
            print(f"{model_name}, {setting}: {counts[setting]}", flush=True)
        names = [FULL, *PEERS]
        rows = [[s, *(_cell(c, name) for name in names)] for s, c in counts.items()]
        tables.append({"caption": model_name, "columns": ["", *names], "rows": rows})
        data[model_name] = counts
    harness.publish(
        "saved_bytes",
        title="Memory kept for the backward pass",
        claim=(
            "Bytes that autograd keeps between forward and backward of one all-linear step, each block "
            "of memory once and parameters left out. The models' own dropout is off. Ratios are to PEFT."
        ),
        tables=tables,
        data=data,
        settings={"rows": ROWS, "tokens a row": LENGTH, "r": R},
        device=options.device,
    )


def saved(model: nn.Module) -> int:
    """Bytes kept for the backward pass of one step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**tokens(model, ROWS, LENGTH)).last_hidden_state[:, 0].float().square().mean()
    loss.backward()
    return sum(kept.values())


def _cell(counts: dict[str, int], name: str) -> str:
    if name not in counts:
        return ""
    cell = f"{counts[name] / 2**20:.1f} MiB"
    return cell if name == REFERENCE else f"{cell} ({counts[name] / counts[REFERENCE]:.2f}×)"


if __name__ == "__main__":
    main()
