"""Training step: forward, backward and AdamW, against the least that any adapter method can take.

That limit is the frozen model: the same model with nothing to train, forward and backward down to the
embeddings' output.
"""

from __future__ import annotations

import harness
import torch
from models import ALL_LINEAR, MODELS, PEERS, QUERY_VALUE, tokens
from torch import nn

ROWS, LENGTH, R = 16, 64, 8
SETTINGS = {
    "query and value, dropout 0": (QUERY_VALUE, 0.0),
    "all-linear, dropout 0": (ALL_LINEAR, 0.0),
    "all-linear, dropout 0.1": (ALL_LINEAR, 0.1),
}
LIMIT, FULL = "frozen model", "full fine-tuning"


def main() -> None:
    """Measure every model under every setting."""
    options = harness.options(__doc__)
    tables, data = [], {}
    for model_name, make in MODELS.items():

        def contestant(model: nn.Module) -> harness.Contestant:
            return harness.Contestant(step(model.to(options.device).train()))

        comparisons = []
        for setting, (targets, dropout) in SETTINGS.items():
            adapted = {name: adapt(make(), targets, r=R, dropout=dropout) for name, adapt in PEERS.items()}
            models = {LIMIT: frozen(make()), **adapted, FULL: make()}
            comparisons.append(
                harness.alternate(
                    setting,
                    {name: contestant(model) for name, model in models.items()},
                    reference=LIMIT,
                    options=options,
                )
            )
        tables.append(harness.table(comparisons, model_name))
        data[model_name] = harness.seconds(comparisons)
    harness.publish(
        "step",
        title="Training step",
        claim=(
            "Forward, backward and AdamW in float32. The limit for any adapter method is the frozen model: "
            "nothing to train, forward and backward down to the embeddings' output. The models' own dropout "
            "is off, so that only the method's counts."
        ),
        tables=tables,
        data=data,
        settings={"rows": ROWS, "tokens a row": LENGTH, "r": R},
        device=options.device,
        rounds=options.rounds,
    )


def step(model: nn.Module) -> harness.Work:
    """One training step of a model; the loss is as cheap as a loss can be."""
    batch = tokens(model, ROWS, LENGTH)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True) if trainable else None

    def run(_: None) -> None:
        model(**batch).last_hidden_state[:, 0].square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def frozen(model: nn.Module) -> nn.Module:
    """Nothing to train, but the embeddings' output asks for a gradient, so backward goes all the way."""
    model.requires_grad_(False)
    model.get_submodule("embeddings").register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    return model


if __name__ == "__main__":
    main()
