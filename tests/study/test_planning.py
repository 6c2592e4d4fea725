from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica import study
from lorica.cli import main
from lorica.errors import ConfigError
from lorica.model.pretrained.skeleton import skeleton
from lorica.study.planning import GPT3, OPTIMIZERS
from lorica.study.planning.tracing import trace

pytest.importorskip("transformers")

BERT: dict[str, Any] = {
    "model_type": "bert",
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
}
BERT |= {"intermediate_size": 96, "vocab_size": 300}
HEAD = lorica.LoraConfig(r=4, task_type="SEQ_CLS")
HALF = torch.float16


def gpt3(r: int, targets: list[str]) -> lorica.LoraConfig:
    return lorica.LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("r", "targets", "trainable"),
    [
        (2, ["v_proj"], 4_718_592),
        (1, ["q_proj", "v_proj"], 4_718_592),
        (4, ["q_proj", "v_proj"], 18_874_368),
        (2, ["q_proj", "k_proj", "v_proj", "out_proj"], 18_874_368),
        (4, ["q_proj", "k_proj", "v_proj", "out_proj"], 37_748_736),
    ],
)
def test_the_papers_counts_of_gpt3(r: int, targets: list[str], trainable: int) -> None:
    """Tables 4 and 15; for r = 4 of all four the text of appendix D.4 prints r = 2."""
    small = GPT3 | {"num_hidden_layers": 2}  # every layer has the same
    counted = lorica.count(gpt3(r, targets), small)
    assert counted.trainable * 96 // 2 == trainable


def test_the_papers_memory_of_gpt3() -> None:
    """§4.2: 350 GB and 1.2 TB against 350 GB; it does not say what it counted.

    With weights, gradients and both moments in 16 bits it is 1.27 TiB, and the paper cuts figures off.
    """

    def plans(method: Any) -> list[study.Plan]:
        """Of one layer and of two. Each has the same: 96 have 94 times the difference more than two."""
        config = gpt3(4, ["q_proj", "v_proj"])
        return [
            study.plan(GPT3 | {"num_hidden_layers": n}, config, method=method, batch=1, length=1, dtype=HALF)
            for n in (1, 2)
        ]

    def of_96(method: str, field: str) -> int:
        one, two = (getattr(plan, field) for plan in made[method])
        return two + 94 * (two - one)

    made = {method: plans(method) for method in ("full", "lora")}
    assert GPT3["num_hidden_layers"] == 96
    assert of_96("full", "parameters") == 174_604_283_904
    assert of_96("full", "full_checkpoint") == pytest.approx(350e9, rel=0.01)
    assert of_96("full", "states") / 2**40 == pytest.approx(1.27, abs=0.005)
    assert of_96("lora", "states") == pytest.approx(350e9, rel=0.01)
    assert 2 * of_96("lora", "trainable") / 2**20 == pytest.approx(35, rel=0.03)  # 36.0 MiB in 16 bits
    assert of_96("lora", "flops") / of_96("full", "flops") == pytest.approx(2 / 3, rel=0.01)
    assert "float16" in str(made["full"][0])
    assert "adamw's 2 copies" in str(made["full"][0])


def test_states_by_hand() -> None:
    full = study.plan(BERT, HEAD, method="full", batch=2, length=8)
    ours = study.plan(BERT, HEAD, batch=2, length=8)
    assert full.trainable == full.parameters
    assert (full.weights, full.gradients, full.optimizer) == tuple(n * full.parameters * 4 for n in (1, 1, 2))
    head = 48 * 2 + 2
    assert ours.trainable == 3 * 2 * 2 * 48 * 4 + head
    assert ours.checkpoint == 4 * ours.trainable
    assert ours.optimizer == 8 * ours.trainable
    assert ours.parameters == full.parameters + ours.trainable
    for name, copies in OPTIMIZERS.items():
        assert study.plan(BERT, HEAD, batch=1, length=2, optimizer=name).optimizer == copies * ours.gradients
    packed = study.plan(BERT, HEAD, method="qlora", batch=2, length=8)
    linear = 3 * (4 * 48 * 48 + 2 * 48 * 96) + 48 * 48
    assert ours.weights - packed.weights == pytest.approx(linear * (4 - 4.127 / 8), rel=0.02)


def test_what_a_step_holds_is_what_autograd_saves() -> None:
    """A chain whose activations are known: each layer's input, and one gradient in passing."""
    width, rows, depth = 64, 1000, 6
    with torch.device("meta"):
        chain = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width, bias=False), nn.Sigmoid()) for _ in range(depth))
        )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.chain(x).sum()}

    activation = rows * width * 4
    step = trace(Model(), {"x": torch.empty(rows, width, device="meta")})
    products = 2 * rows * width * width
    assert step.flops == products * (3 * depth - 1)  # the first needs no gradient of its input
    assert depth * activation <= step.held <= (depth + 4) * activation


def test_activations_grow_with_batch_and_length_and_shrink_with_checkpointing() -> None:
    one, two, long = (
        study.plan(BERT, HEAD, batch=b, length=n).activations for b, n in ((4, 32), (8, 32), (4, 64))
    )
    assert two == pytest.approx(2 * one, rel=0.02)
    assert long > 2 * one  # attention's are quadratic
    plain, again = (study.plan(BERT, HEAD, batch=4, length=32, checkpointing=c) for c in (False, True))
    assert again.activations < 0.6 * plain.activations
    assert plain.flops < again.flops < 2 * plain.flops


def test_attention_without_dropout_keeps_no_matrix_of_all_pairs() -> None:
    """What a row holds is then proportional to its length; the products are counted all the same."""
    small = {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = lorica.LoraConfig(r=2, task_type="CAUSAL_LM")
    held, flops = {}, {}
    for dropout in (0.0, 0.1):
        plans = [
            study.plan(small | {"attention_dropout": dropout}, config, batch=1, length=n) for n in (256, 512)
        ]
        held[dropout] = plans[1].activations / plans[0].activations
        flops[dropout] = plans[1].flops
    assert held[0.0] == pytest.approx(2, rel=0.25)  # the causal mask is quadratic, and small
    assert held[0.1] > 3
    assert flops[0.1] < flops[0.0] < 1.3 * flops[0.1]  # the scores are computed again backward


def test_what_each_of_several_ranks_holds() -> None:
    """Added up by hand from the model itself: two of its layers are whole at once, and what is in none."""
    found = study.plan(BERT, HEAD, batch=2, length=8)
    model: Any = lorica.adapt(skeleton(BERT, "SEQ_CLS", dtype=torch.float32), HEAD)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.bert.encoder.layer]
    embeddings = sum(p.numel() for p in model.bert.embeddings.parameters())  # a block by itself
    others = found.parameters - sum(layers) - embeddings
    whole = others + sum(sorted([*layers, embeddings])[-2:])
    on = found.on_ranks(4)
    assert on["ddp"] == found.memory + found.gradients
    assert on["fsdp2"] == -(-found.states // 4) + 4 * whole + found.activations
    with pytest.raises(ConfigError, match="ranks must be at least 1"):
        found.on_ranks(0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_language_models(model_type: str) -> None:
    small = {"model_type": model_type, "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 16}
    small |= {"num_attention_heads": 2, "intermediate_size": 32, "ffn_dim": 32, "num_key_value_heads": 2}
    small |= {"word_embed_proj_dim": 16, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = lorica.LoraConfig(r=2, task_type="CAUSAL_LM")
    assert study.plan(small, config, batch=2, length=16).activations > 0
    classifier = lorica.LoraConfig(r=2, task_type="SEQ_CLS")
    assert study.plan(small, classifier, batch=2, length=16).trainable > 0


def test_conv1d_is_packed_too() -> None:
    """GPT-2's layers, which transformers stores transposed: bitsandbytes packs them all the same."""
    small = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}
    plain, packed = (study.plan(small, gpt3(2, ["c_attn"]), method=m, length=16) for m in ("lora", "qlora"))
    assert plain.weights - packed.weights == pytest.approx(2 * 12 * 64 * 64 * (4 - 4.127 / 8), rel=0.01)


def test_a_head_that_the_folder_names(tmp_path: Any) -> None:
    """As if its task had been said: with labels, so that the loss counts."""
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    t5 |= {"vocab_size": 40}
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
    cases = (
        (t5, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q"]),
        (gpt2, "GPT2LMHeadModel", "CAUSAL_LM", ["c_attn"]),
    )
    for fields, name, task, targets in cases:
        (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": [name]}))
        config = lorica.LoraConfig(r=2, target_modules=targets, task_type=task)
        said = study.plan(fields, config, batch=2, length=8)
        found = study.plan(str(tmp_path), config.replace(task_type=None), batch=2, length=8)
        assert (found.activations, found.flops) == (said.activations, said.flops)
    bare = study.plan(t5, lorica.LoraConfig(r=2, target_modules=["q"]), batch=2, length=8)
    assert bare.flops > 0
    one = study.plan(BERT | {"num_labels": 1}, HEAD, batch=2, length=8)
    assert one.flops > 0


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        (BERT | {"max_position_embeddings": 20}, 20),
        (BERT | {"model_type": "roberta", "max_position_embeddings": 22, "pad_token_id": 1}, 20),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}, 20),
        (
            {
                "model_type": "distilbert",
                "dim": 16,
                "n_layers": 1,
                "n_heads": 2,
                "max_position_embeddings": 20,
            },
            20,
        ),
        (BERT | {"model_type": "llama", "max_position_embeddings": 20}, None),
    ],
)
def test_no_more_tokens_than_places(fields: dict[str, Any], places: int | None) -> None:
    config = lorica.LoraConfig(r=2, task_type="SEQ_CLS")
    if places is None:  # turned by angles, of which there are always more
        assert study.plan(fields, config, batch=1, length=64).flops > 0
        return
    assert study.plan(fields, config, batch=1, length=places).flops > 0
    with pytest.raises(
        ConfigError, match=f"length must be at most {places}, the positions that .* has, not 21"
    ):
        study.plan(fields, config, batch=1, length=21)


def test_a_model_that_wants_other_inputs_is_refused() -> None:
    clip = {"model_type": "clip", "projection_dim": 8}
    with pytest.raises(ConfigError, match="CLIPModel cannot be planned: a step on its input_ids alone fails"):
        study.plan(clip, lorica.LoraConfig(r=2, target_modules=["q_proj"]), batch=1, length=8)


def test_images() -> None:
    small = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    assert study.plan(small, lorica.LoraConfig(r=2), batch=2).flops > 0


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    found = study.largest_batch(BERT, 0.05, HEAD, length=64)
    assert found.memory <= 0.05e9
    assert study.plan(BERT, HEAD, batch=found.batch + 1, length=64).memory > 0.05e9
    with pytest.raises(ConfigError, match=r"not even one row of 64 tokens fits into 0\.0001 GB"):
        study.largest_batch(BERT, 0.0001, HEAD, length=64)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (BERT, {"method": "prompt"}, "method must be one of lora, full, qlora, not 'prompt'"),
        (BERT, {"optimizer": "lion"}, "optimizer must be one of adamw, sgd, momentum"),
        (BERT, {"batch": 0}, "batch and length must be at least 1, not 0"),
        ({"model_type": "none"}, {}, "no model configuration can be had from"),
        (3, {}, "not by a int"),
    ],
)
def test_bad_input(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.plan(model, HEAD, **settings)


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    argv = ["plan", str(tmp_path), "--method.task_type=SEQ_CLS", "--method.r=4", "--batch=2", "--length=8"]
    assert main([*argv, "--method=all"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"{m}\n") for m in ("full", "lora", "qlora")] == [1, 2, 1]
    assert main([*argv, "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["trainable"]
        == study.plan(
            BERT | {"num_labels": 12}, HEAD.replace(target_modules="all-linear"), batch=1, length=1
        ).trainable
    )
    assert main([*argv, "--fit", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] <= 0.1e9
    assert main([*argv, "--dtype=float8"]) == 1
    assert "--dtype must be one of" in capsys.readouterr().err
