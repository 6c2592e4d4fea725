"""Where an update belongs in the files of a checkpoint, and what has no place there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streams import adapter, delta, factors, read_all, write_base
from tiny import transformer

from lorica.adapter import Adapter, Factors
from lorica.checkpoint import stream
from lorica.checkpoint.stream.names import fused_rows
from lorica.errors import AdapterError, ConfigError, FileError


@pytest.mark.parametrize(
    ("module", "tensor"),
    [
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("model.vision_tower.layers.0.q_proj", "vision_tower.layers.0.q_proj"),
        ("model.language_model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.visual.blocks.0.proj", "visual.blocks.0.proj"),
        ("layers.0.q_proj", "model.decoder.layers.0.q_proj"),
        ("model.layers.0.q_proj", "layers.0.q_proj"),
    ],
)
def test_names_that_libraries_change(tmp_path: Path, module: str, tensor: str) -> None:
    weight = torch.randn(8, 6)
    update = factors(8, 6)
    base = write_base(tmp_path / "base", {f"{tensor}.weight": weight})
    stream.merge(base, adapter({module: update}), tmp_path / "out")
    torch.testing.assert_close(read_all(tmp_path / "out")[f"{tensor}.weight"], weight + delta(update))


def test_a_module_that_could_be_in_two_places_is_refused(tmp_path: Path) -> None:
    towers = {f"{tower}.layers.0.q_proj.weight": torch.randn(8, 6) for tower in ("text", "vision")}
    base = write_base(tmp_path / "base", towers)
    with pytest.raises(AdapterError, match=r"under 'text\.', under 'vision\.'"):
        stream.merge(base, adapter({"layers.0.q_proj": factors(8, 6)}), tmp_path / "out")


def test_modules_that_are_fused_on_disk_get_their_rows(tmp_path: Path) -> None:
    q, k, v, gate, up = factors(8, 6), factors(2, 6), factors(2, 6), factors(5, 6), factors(5, 6)
    W, G = torch.randn(12, 6), torch.randn(10, 6)
    base = write_base(tmp_path / "base", {"l.qkv_proj.weight": W, "l.gate_up_proj.weight": G})
    parts = {"l.q_proj": q, "l.v_proj": v, "l.up_proj": up}
    report = stream.merge(base, adapter(parts), tmp_path / "out")
    out = read_all(tmp_path / "out")
    nothing = torch.zeros(2, 6)
    torch.testing.assert_close(out["l.qkv_proj.weight"], W + torch.cat([delta(q), nothing, delta(v)]))
    torch.testing.assert_close(out["l.gate_up_proj.weight"], G + torch.cat([torch.zeros(5, 6), delta(up)]))
    assert report.layers.keys() == parts.keys()
    stream.merge(base, adapter({"l.k_proj": k, "l.gate_proj": gate}), tmp_path / "other")
    out = read_all(tmp_path / "other")
    torch.testing.assert_close(
        out["l.qkv_proj.weight"], W + torch.cat([torch.zeros(8, 6), delta(k), nothing])
    )
    torch.testing.assert_close(out["l.gate_up_proj.weight"], G + torch.cat([delta(gate), torch.zeros(5, 6)]))


def test_rows_that_fit_no_part_of_a_fused_tensor(tmp_path: Path) -> None:
    assert fused_rows("q_proj", 7, 12) is None
    assert fused_rows("k_proj", 6, 12) == (0, 6)
    assert fused_rows("v_proj", 6, 12) is None
    base = write_base(tmp_path / "base", {"l.gate_up_proj.weight": torch.randn(10, 6)})
    with pytest.raises(AdapterError, match=r"l\.up_proj: 4 rows are no part of the 10 of l\.gate_up_proj"):
        stream.merge(base, adapter({"l.up_proj": factors(4, 6)}), tmp_path / "out")


def test_a_fused_module_is_split_over_the_tensors_on_disk(tmp_path: Path) -> None:
    update = factors(12, 6)
    weights = {f"l.{n}_proj.weight": torch.randn(rows, 6) for n, rows in (("q", 8), ("k", 2), ("v", 2))}
    base = write_base(tmp_path / "base", weights)
    stream.merge(base, adapter({"l.qkv_proj": update}), tmp_path / "out")
    for (name, W), change in zip(weights.items(), delta(update).split([8, 2, 2]), strict=True):
        torch.testing.assert_close(read_all(tmp_path / "out")[name], W + change)


def test_a_square_weight_is_transposed_where_the_architecture_says_so(tmp_path: Path) -> None:
    W, update = torch.randn(6, 6), factors(6, 6)
    for model, expected in (("gpt2", W + delta(update).T), ("llama", W + delta(update))):
        base = write_base(tmp_path / model, {"h.c_proj.weight": W}, config={"model_type": model})
        stream.merge(base, adapter({"h.c_proj": update}, fan_in_fan_out=True), tmp_path / f"{model}-out")
        torch.testing.assert_close(read_all(tmp_path / f"{model}-out")["h.c_proj.weight"], expected)


def test_convolutions(tmp_path: Path) -> None:
    W, A, B = torch.randn(5, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.randn(5, 2, 1, 1)
    base = write_base(tmp_path / "base", {"conv.weight": W})
    stream.merge(base, adapter({"conv": Factors(A, B, 0.5, "conv")}), tmp_path / "out")
    expected = W + 0.5 * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    torch.testing.assert_close(read_all(tmp_path / "out")["conv.weight"], expected)


def test_all_that_has_no_place_is_listed(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, _ = toy
    misfits = adapter(
        {"a": factors(8, 7), "c": factors(2, 2), "lm_head": factors(3, 3), "norm": factors(6, 1)},
        {"a.bais": torch.zeros(8), "b.weight": torch.zeros(4, 8)},
    )
    with pytest.raises(AdapterError) as caught:
        stream.merge(base, misfits, tmp_path / "out")
    for expected in (
        "shape of a: the update's is (8, 7), the base's (8, 6)",
        "c is not in the base",
        "lm_head is not in the base",
        "shape of norm",
        "a.bais is not in the base; did you mean 'a.bias'",
        "shape of b.weight: (4, 8) in the adapter, (5, 8) in the base",
        "merge in memory: lorica merge without --stream",
    ):
        assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.zeros(8, 6, dtype=torch.uint8)})
    with pytest.raises(AdapterError, match="stored as U8, so it is quantized"):
        stream.merge(base, adapter({"a": factors(8, 6)}), tmp_path / "out")


def test_a_module_trained_whole_must_be_there_whole(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base",
        {"a.weight": torch.randn(8, 6), "head.weight": torch.randn(2, 8), "head.bias": torch.zeros(2)},
    )
    partial = adapter({"a": factors(8, 6)}, {"head.weight": torch.ones(2, 8)}, modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"missing: head\.bias"):
        stream.merge(base, partial, tmp_path / "out")


def test_a_tie_of_unknown_names_is_refused(tmp_path: Path) -> None:
    model = transformer("t5")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    table = model.get_parameter("shared.weight").shape
    update = Factors(torch.randn(2, table[0]), torch.randn(table[1], 2), 1.0, "embedding")
    with pytest.raises(AdapterError, match="the base ties it to its input embeddings"):
        stream.merge(tmp_path / "base", adapter({"shared": update}), tmp_path / "out")


def test_a_tie_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 9}
    tensors = {"model.embed_tokens.weight": torch.randn(9, 4), "lm_head.weight": torch.randn(9, 4)}
    base = write_base(tmp_path / "base", tensors, config=config)
    with pytest.raises(AdapterError, match="holds two that differ"):
        stream.merge(base, adapter({"lm_head": factors(9, 4)}), tmp_path / "out")


def test_values_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", {"a.weight": torch.full((8, 6), 6e4).half(), "b": torch.full((4,), 7e4)}
    )
    large = adapter({"a": Factors(torch.ones(2, 6), torch.full((8, 2), 1e5), 1.0)})
    with pytest.raises(AdapterError, match="a: the merged weight would hold NaN or infinity"):
        stream.merge(base, large, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="b holds values that"):
        stream.merge(base, adapter({"a": factors(8, 6, size=10)}), tmp_path / "out", dtype="float16")


def test_dtypes_that_are_none(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int8'"):
        stream.merge(*toy, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        stream.merge(*toy, tmp_path / "out", dtype=torch.int8)


def test_bases_that_are_none(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    cases: list[tuple[str, Callable[[Path], object]]] = [
        ("is not a folder", lambda folder: shutil.rmtree(folder)),
        ("it has none", lambda folder: [path.unlink() for path in folder.iterdir()]),
        ("is not there", lambda folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        ("truncated", lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 20)),
        ("its header speaks of", lambda folder: _shorten(folder / "model-00003-of-00003.safetensors")),
        ("no weight_map", lambda folder: (folder / "model.safetensors.index.json").write_text("{}")),
        ("should hold a JSON object", lambda folder: (folder / "config.json").write_text("[]")),
        ("as JSON", lambda folder: (folder / "config.json").write_text("{")),
    ]
    for i, (message, spoil) in enumerate(cases):
        copy = Path(shutil.copytree(base, tmp_path / f"base{i}"))
        spoil(copy)
        with pytest.raises(FileError, match=message):
            stream.merge(copy, value, tmp_path / "out")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = "model-00001-of-00003.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="more: not in model-00001"):
        stream.merge(base, value, tmp_path / "out")


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])
