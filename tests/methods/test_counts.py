"""Every count of trainable parameters that the LoRA paper prints, from its formula and from the architecture.

`docs/paper.md` shows the same table; `python tests/methods/test_counts.py` prints it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lorica
from lorica import (
    AdapterDConfig,
    AdapterHConfig,
    AdapterLConfig,
    AdapterPConfig,
    BitFitConfig,
    FullConfig,
    LoraConfig,
    PreEmbedConfig,
    PreLayerConfig,
    TopConfig,
)
from lorica.config import AdapterConfig
from lorica.study.planning import GPT3 as SPLIT_GPT3

pytest.importorskip("transformers")

PAPER = Path(__file__).parents[2] / "docs" / "paper.md"
WORDS = 50257


class Model(NamedTuple):
    """An architecture: its name, blocks, width, positions, and transformers' configuration of it."""

    name: str
    L: int
    d: int
    positions: int
    config: dict[str, Any]

    @property
    def blocks(self) -> int:
        """Parameters of its blocks: 12·d² of matrices and 13·d of biases and norms in each."""
        return self.L * (12 * self.d**2 + 13 * self.d)

    @property
    def full(self) -> int:
        """All parameters of a GPT, with one table for words in and out."""
        return self.blocks + (WORDS + self.positions) * self.d + 2 * self.d


def gpt2(name: str, layers: int, d: int, heads: int, positions: int = 1024) -> Model:
    shape = {"n_layer": layers, "n_embd": d, "n_head": heads, "n_positions": positions}
    return Model(name, layers, d, positions, {"model_type": "gpt2", **shape})


def roberta(name: str, layers: int, d: int, heads: int) -> Model:
    shape = {"num_hidden_layers": layers, "hidden_size": d, "num_attention_heads": heads}
    words = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    inner = {"intermediate_size": 4 * d}
    return Model(name, layers, d, 514, {"model_type": "roberta", **shape, **words, **inner})


GPT3 = gpt2("GPT-3 175B", 96, 12288, 96, 2048)
# The same blocks with a module each for query, key, value and output.
SPLIT = GPT3._replace(config=SPLIT_GPT3)
MEDIUM, LARGE = gpt2("GPT-2 medium", 24, 1024, 16), gpt2("GPT-2 large", 36, 1280, 20)
BASE, ROBERTA_LARGE = roberta("RoBERTa base", 12, 768, 12), roberta("RoBERTa large", 24, 1024, 16)
DEBERTA = Model(
    "DeBERTa XXL",
    48,
    1536,
    512,
    {"model_type": "deberta-v2", "num_hidden_layers": 48, "hidden_size": 1536, "num_attention_heads": 24}
    | {"intermediate_size": 6144, "vocab_size": 128100, "relative_attention": True, "position_buckets": 256}
    | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "conv_kernel_size": 3, "type_vocab_size": 0}
    | {"position_biased_input": False, "norm_rel_ebd": "layer_norm"},
)


class Figure(NamedTuple):
    """A count: of what, by which formula, and as the paper prints it."""

    model: Model
    what: str
    config: AdapterConfig | list[AdapterConfig]
    formula: str
    expected: int
    printed: str
    remark: str = ""


def lora(model: Model, r: int, *targets: str) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=r, target_modules=list(targets), task_type=task(model))


def task(model: Model) -> str | None:
    return "CAUSAL_LM" if model.config["model_type"] in ("gpt2", "opt") else None


def bottlenecks(model: Model, adapters: int, r: int, norms: int = 0) -> int:
    """What the paper's formula gives: ``adapters·(2·d·r + r + d) + 2·norms·d``."""
    return adapters * (2 * model.d * r + r + model.d) + 2 * norms * model.d


def figures() -> list[Figure]:
    """All of them, in the order of the documentation."""
    rows: list[Figure] = []

    def add(
        model: Model, what: str, config: Any, formula: str, expected: int, printed: str, remark: str = ""
    ):
        rows.append(Figure(model, what, config, formula, expected, printed, remark))

    lm: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    L, d = GPT3.L, GPT3.d
    all_gpt = "12·L·d² + 13·L·d + (V + n)·d + 2·d"
    add(GPT3, "FT", FullConfig(**lm), all_gpt, GPT3.full, "175,255.8M", "does not follow from public sizes")
    add(GPT3, "BitFit", BitFitConfig(**lm), "11·L·d + d", 11 * L * d + d, "14.2M", "matches 12·L·d")
    for prefix, printed in ((32, "0.4M"), (64, "0.9M"), (128, "1.7M"), (256, "3.2M"), (512, "6.4M")):
        config = PreEmbedConfig(prefix=prefix, infix=8, **lm)
        add(GPT3, f"PreEmbed {prefix}+8", config, "d·(lp + li)", d * (prefix + 8), printed)
    sizes = ((2, 2, "5.1M"), (8, 0, "10.1M"), (8, 8, "20.2M"), (32, 4, "44.1M"), (64, 0, "76.1M"))
    for prefix, infix, printed in sizes:
        config = PreLayerConfig(prefix=prefix, infix=infix, **lm)
        add(GPT3, f"PreLayer {prefix}+{infix}", config, "L·d·(lp + li)", L * d * (prefix + infix), printed)
    houlsby = "2·L·(2·d·r + r + d)"
    for r, printed in ((1, "7.1M"), (4, "21.2M"), (8, "40.1M"), (16, "77.9M"), (64, "304.4M")):
        config = AdapterHConfig(bottleneck=r, **lm)
        add(GPT3, f"AdapterH r={r}", config, houlsby, bottlenecks(GPT3, 2 * L, r), printed)
    q, k, v, o = "q_proj", "k_proj", "v_proj", "out_proj"
    for what, r, targets, printed in (
        ("v r=2", 2, (v,), "4.7M"),
        ("q, v r=1", 1, (q, v), "4.7M"),
        ("q, v r=2", 2, (q, v), "9.4M"),
        ("q, k, v, o r=1", 1, (q, k, v, o), "9.4M"),
        ("q r=8", 8, (q,), "18M"),
        ("q, v r=4", 4, (q, v), "18.8M"),
        ("q, k, v, o r=2", 2, (q, k, v, o), "18.8M"),
        ("q, v r=8", 8, (q, v), "37.7M"),
        ("q, k, v, o r=4", 4, (q, k, v, o), "37.7M"),
        ("q, v r=64", 64, (q, v), "301.9M"),
        ("q, k, v, o r=64", 64, (q, k, v, o), "603.8M"),
    ):
        n = len(targets) * L
        add(SPLIT, f"LoRA {what}", lora(SPLIT, r, *targets), "2·L̂·d·r", 2 * n * d * r, printed)
    for r, printed in ((8, "37.8M"), (32, "151.1M"), (64, "302.1M")):
        both = [lora(SPLIT, r, q, v), PreEmbedConfig(prefix=8, infix=4, **lm)]
        add(SPLIT, f"LoRA q, v r={r} + PreEmbed 8+4", both, "sum", 4 * L * d * r + 12 * d, printed)
    both = [lora(SPLIT, 8, q, v), PreLayerConfig(prefix=8, infix=4, **lm)]
    add(SPLIT, "LoRA q, v r=8 + PreLayer 8+4", both, "sum", 4 * L * d * 8 + 12 * L * d, "52.8M")

    inferred = "the setting is inferred from the count"
    lin = "L·(2·d·r + r + d) + 2·L·d"
    for model, printed in ((MEDIUM, "354.92M"), (LARGE, "774.03M")):
        add(model, "FT", FullConfig(**lm), all_gpt, model.full, printed)
    top = 2 * (12 * MEDIUM.d**2 + 13 * MEDIUM.d)
    add(MEDIUM, "FT-Top2", TopConfig(blocks=2, **lm), "2·(12·d² + 13·d)", top, "25.19M")
    for model, printed in ((MEDIUM, "0.35M"), (LARGE, "0.77M")):
        config = lora(model, 4, "c_attn")
        add(model, "LoRA r=4", config, "4·L·d·r", 4 * model.L * model.d * 4, printed)
    for model, r, printed in ((MEDIUM, 6, "0.37M"), (MEDIUM, 224, "11.09M"), (LARGE, 8, "0.88M")):
        count = bottlenecks(model, model.L, r, model.L)
        add(model, f"AdapterL r={r}", AdapterLConfig(bottleneck=r, **lm), lin, count, printed, inferred)
    count = bottlenecks(LARGE, LARGE.L, 248, LARGE.L)
    add(LARGE, "AdapterL r=248", AdapterLConfig(bottleneck=248, **lm), lin, count, "23.00M", inferred)
    count = bottlenecks(MEDIUM, 2 * MEDIUM.L, 112)
    add(MEDIUM, "AdapterH r=112", AdapterHConfig(bottleneck=112, **lm), houlsby, count, "11.09M", inferred)
    for model, tokens, printed in ((MEDIUM, 14, "0.35M"), (LARGE, 17, "0.77M")):
        config, count = PreLayerConfig(prefix=tokens, **lm), model.L * model.d * tokens
        add(model, f"PreLayer {tokens}+0", config, "L·d·(lp + li)", count, printed, inferred)

    for model, printed in ((BASE, "125.0M"), (ROBERTA_LARGE, "355.0M")):
        tables = (50265 + 514 + 1 + 2) * model.d
        count = model.blocks + tables + model.d**2 + model.d
        add(model, "FT", FullConfig(), "12·L·d² + 13·L·d + (V + n + 3)·d + d² + d", count, printed)
    add(BASE, "BitFit", BitFitConfig(), "11·L·d + d", 11 * BASE.L * BASE.d + BASE.d, "0.1M")
    for model, printed in ((BASE, "0.3M"), (ROBERTA_LARGE, "0.8M")):
        config = lora(model, 8, "query", "value")
        add(model, "LoRA q, v r=8", config, "2·L̂·d·r", 4 * model.L * model.d * 8, printed)
    for r, printed in ((16, "0.8M"), (64, "3.0M")):
        count = bottlenecks(ROBERTA_LARGE, 24, r)
        config = AdapterPConfig(bottleneck=r)
        add(ROBERTA_LARGE, f"AdapterP r={r}", config, "L·(2·d·r + r + d)", count, printed)
    for r, printed in ((8, "0.8M"), (64, "6.0M")):
        count = bottlenecks(ROBERTA_LARGE, 48, r)
        add(ROBERTA_LARGE, f"AdapterH r={r}", AdapterHConfig(bottleneck=r), houlsby, count, printed)
    for r, dropped, printed in ((48, 0, "0.9M"), (16, 0, "0.3M"), (48, 8, "0.3M")):
        count = bottlenecks(BASE, 12 - dropped, r)
        config = AdapterDConfig(bottleneck=r, dropped=dropped)
        what = f"AdapterD r={r}, {dropped} dropped"
        add(BASE, what, config, "(L − dropped)·(2·d·r + r + d)", count, printed, inferred)
    for r in (8, 16):
        config = lora(DEBERTA, r, "query_proj", "value_proj")
        remark = "table 10 prints this rank" if r == 8 else "the rank of the published scripts"
        add(DEBERTA, f"LoRA q, v r={r}", config, "2·L̂·d·r", 4 * 48 * 1536 * r, "4.7M", remark)
    return rows


FIGURES = figures()


def line(figure: Figure) -> str:
    """A figure's row in the documentation."""
    cells = (figure.model.name, figure.what, figure.formula, f"{figure.expected:,}", figure.printed)
    return f"| {' | '.join(cells)} | {deviation(figure)} |"


def deviation(figure: Figure) -> str:
    """How far the printed figure is off; nothing where its digits are the count's, cut or rounded."""
    printed = float(figure.printed.rstrip("M").replace(",", ""))
    digits = len(figure.printed.rstrip("M").partition(".")[2])
    millions = figure.expected / 1e6
    cut = math.floor(millions * 10**digits) / 10**digits
    agrees = math.isclose(printed, cut) or math.isclose(printed, round(millions, digits))
    off = "" if agrees else f"{100 * (printed / millions - 1):+.2g} %"
    return "; ".join(part for part in (off, figure.remark) if part)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.model.name} {f.what}")
def test_formula_and_architecture_agree(figure: Figure) -> None:
    counted = lorica.count(figure.config, figure.model.config).trainable
    if figure.what == "BitFit" and figure.model is BASE:
        counted -= BASE.d  # the pooler's bias, which the paper's model has a head instead of
    assert counted == figure.expected


def test_the_documentation_has_them() -> None:
    text = PAPER.read_text(encoding="utf-8")
    assert [line(figure) for figure in FIGURES if line(figure) not in text] == []


def test_the_released_adapter_is_lora_and_head() -> None:
    """The 0.8M of the paper's repository for RoBERTa base, and the size of the file that it offers."""
    config = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    counted = lorica.count(config, {**BASE.config, "num_labels": 3}).trainable
    assert counted == 4 * 12 * 768 * 8 + (768**2 + 768) + 3 * (768 + 1) == 887_811


def test_a_count_refuses_what_adapt_refuses() -> None:
    with pytest.raises(lorica.LoricaError, match="leaves no adapter in a stack of 12"):
        lorica.count(AdapterDConfig(dropped=12), BASE.config)
    with pytest.raises(lorica.LoricaError, match="own the same parameter"):
        lorica.count([FullConfig(), BitFitConfig()], BASE.config)


if __name__ == "__main__":
    print("\n".join(map(line, FIGURES)))
