"""Merging on disk, against the merge in memory: the same bits, whatever the architecture."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import anonymous_memory
import pytest
import torch
from streams import BFLOAT16, adapter, assert_same, delta, factors, read_all, write_base
from tiny import adapted, outputs, transformer
from torch import nn

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint import stream
from lorica.checkpoint.stream import blocks
from lorica.checkpoint.stream.shards import read_shard
from lorica.errors import FileError, LoricaWarning

TIED = {"tie_word_embeddings": True}

CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], Any, str]] = {
    "llama, sharded": ("llama", BFLOAT16, {}, "all-linear", "10KB"),
    "llama, tied, embeddings": ("llama", torch.float32, TIED, ["q_proj", "embed_tokens"], "10KB"),
    "llama, tied, head": ("llama", BFLOAT16, TIED, ["v_proj", "lm_head"], "10KB"),
    "llama, tied, both": ("llama", BFLOAT16, TIED, ["embed_tokens", "lm_head"], "5GB"),
    "llama, tied, neither": ("llama", BFLOAT16, TIED, ["down_proj"], "5GB"),
    "gpt2, Conv1D": ("gpt2", torch.float32, {}, ["c_attn", "c_proj", "c_fc"], "10KB"),
    "gpt2, tied": ("gpt2", BFLOAT16, {}, ["c_proj", "wte"], "5GB"),
    "opt, float16": ("opt", torch.float16, {}, "all-linear", "5GB"),
    "bert, head": ("bert-classifier", torch.float32, {}, ["query", "dense", "word_embeddings"], "5GB"),
    "bert, biases": ("bert-classifier", BFLOAT16, {"bias": "all"}, ["query"], "5GB"),
    "t5": ("t5", BFLOAT16, {}, ["q", "v", "wo"], "5GB"),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_merge_in_memory(case: str, tmp_path: Path) -> None:
    name, dtype, given, targets, size = CASES[case]
    settings = dict(given)
    bias = settings.pop("bias", "none")
    model = transformer(name, dtype=dtype, **settings)
    model.save_pretrained(tmp_path / "base", max_shard_size=size)  # type: ignore[operator]
    task = "SEQ_CLS" if "classifier" in name else None
    adapted(model, lorica.LoraConfig(r=4, target_modules=targets, task_type=task, bias=bias))
    lorica.save(model, tmp_path / "adapter")
    report = lorica.merge(model)
    model.save_pretrained(tmp_path / "memory", max_shard_size=size)  # type: ignore[operator]

    streamed = stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")

    assert_same(read_all(tmp_path / "memory"), read_all(tmp_path / "disk"))
    both = [json.loads((tmp_path / where / "config.json").read_text()) for where in ("memory", "disk")]
    assert both[0] == both[1]
    assert streamed.layers.keys() == report.layers.keys()
    for path, loss in report.layers.items():
        assert streamed.layers[path] == pytest.approx(loss, rel=1e-3), path
    memory, disk = (
        type(model).from_pretrained(tmp_path / where, dtype=dtype).eval()  # type: ignore[attr-defined]
        for where in ("memory", "disk")
    )
    assert torch.equal(outputs(disk, name.split("-")[0]), outputs(memory, name.split("-")[0]))


def test_tensors_of_many_blocks_come_to_the_same_bits(tmp_path: Path) -> None:
    """Rows that make no whole block, columns that are no multiple of anything, and the other layout."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"tall": nn.Linear(301, 7013, dtype=BFLOAT16), "wide": nn.Embedding(5001, 333)})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = write_base(tmp_path / "base", state)
    lorica.adapt(model, lorica.LoraConfig(r=5, target_modules=["tall", "wide"], init_lora_weights=False))
    lorica.save(model, tmp_path / "adapter")
    lorica.merge(model)
    stream.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_same(dict(model.state_dict()), read_all(tmp_path / "out"))


def test_what_is_rounded_in_passing_stays_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors trained whole in float32, for a base in bfloat16; the disk is slow."""
    names = [f"h.{i}.bias" for i in range(40)]
    shard = {name: torch.randn(16).bfloat16() for name in names}
    base = write_base(tmp_path / "base", {**shard, "a.weight": torch.randn(8, 6).bfloat16()})
    extras = {name: torch.randn(16) for name in names}
    low_rank = adapter({"a": factors(8, 6)})
    write = blocks._write
    monkeypatch.setattr(blocks, "_write", lambda file, view: (time.sleep(0.002), write(file, view)))
    lorica.write(Adapter(low_rank.config, low_rank.factors, extras), tmp_path / "adapter")
    stream.merge(base, tmp_path / "adapter", tmp_path / "out")
    out = read_all(tmp_path / "out")
    assert_same({name: out[name] for name in names}, {name: extras[name].bfloat16() for name in names})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    weight = torch.randn(8, 6).bfloat16()
    shards = {
        "a.weight": weight,
        "norm.weight": torch.ones(6, dtype=BFLOAT16),
        "odd": torch.zeros(3, dtype=torch.bool),
    }
    base = write_base(
        tmp_path / "base",
        shards,
        config={"dtype": "bfloat16", "text_config": {"model_type": "x", "torch_dtype": "bfloat16"}},
    )
    update = factors(8, 6)
    stream.merge(base, adapter({"a": update}), tmp_path / "out", dtype=dtype)
    out, wanted = read_all(tmp_path / "out"), getattr(torch, dtype)
    assert {name: tensor.dtype for name, tensor in out.items()} == {
        "a.weight": wanted,
        "norm.weight": wanted,
        "odd": torch.bool,
    }
    torch.testing.assert_close(
        out["a.weight"], (weight.float() + delta(update)).to(wanted), rtol=1e-3, atol=1e-6
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == (dtype, dtype)


def test_a_base_saved_without_a_head_takes_an_adapter_that_brings_one(tmp_path: Path) -> None:
    model = transformer("bert-classifier", num_labels=3)
    model.bert.save_pretrained(tmp_path / "base")  # type: ignore[union-attr, operator]
    adapted(model, lorica.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    lorica.save(model, tmp_path / "adapter")
    lorica.merge(model)
    stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same(
        {k: v for k, v in model.state_dict().items() if "position_ids" not in k}, read_all(tmp_path / "out")
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    again = type(model).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    assert torch.equal(outputs(again), outputs(model))


def test_an_adapter_made_without_a_head_fits_a_base_with_one(tmp_path: Path) -> None:
    model = transformer("bert-classifier")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    body = adapted(model.bert, lorica.LoraConfig(r=4, target_modules=["query"]))  # type: ignore[arg-type]
    lorica.save(body, tmp_path / "adapter")
    lorica.merge(body)
    stream.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same(dict(model.state_dict()), read_all(tmp_path / "out"))


def test_untouched_files_are_the_bases_and_other_forms_of_the_weights_stay_behind(
    toy: tuple[Path, Adapter], tmp_path: Path
) -> None:
    base, value = toy
    for name in ("pytorch_model.bin", "adapter_config.json", "consolidated.safetensors", ".hidden"):
        (base / name).write_text("old")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    checkpoint.write(value, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    report = stream.merge(base, tmp_path / "adapter", tmp_path / "out")
    found = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert found == {
        "config.json",
        "model.safetensors.index.json",
        "1_Pooling/config.json",
        "tokenizer_config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    assert report.copied == ["model-00002-of-00003.safetensors"]
    assert set(report.left_out) == {"pytorch_model.bin", "adapter_config.json", "consolidated.safetensors"}
    for name in ("model-00002-of-00003.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert "copied as they are: model-00002" in str(report)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_all(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_files_of_any_name_are_carried_over(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    names = ("manifest.json", "manifest.part", "lock", "files/parts", "parts/lock", "lock.part")
    for name in names:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"the base's {name}")
    stream.merge(base, value, tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_text() == f"the base's {name}"
    assert not (tmp_path / "out" / ".merging").exists()


@pytest.mark.parametrize("file", ["../victim/model.safetensors", "ABSOLUTE", "sub/x", 5, None, ["x"], ""])
def test_an_index_that_names_files_elsewhere(file: Any, toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, value = toy
    victim = write_base(tmp_path / "victim", read_all(base)) / "model.safetensors"
    before = victim.read_bytes()
    file = str(victim) if file == "ABSOLUTE" else file
    index = {"weight_map": dict.fromkeys(read_all(base), file)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="should name files that stand beside it"):
        stream.merge(base, value, tmp_path / "out")
    assert victim.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_headers_that_other_writers_make(tmp_path: Path) -> None:
    """An empty tensor before or after the one that starts where it stands, and metadata that are null."""
    described = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for i, header in enumerate(
        ({"a": described, "z": empty}, {"__metadata__": None, "z": empty, "a": described})
    ):
        text = json.dumps(header).encode()
        (tmp_path / f"{i}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        assert list(read_shard(tmp_path / f"{i}.safetensors").entries) == ["z", "a"]


def test_a_file_system_that_cannot_copy_by_itself(
    toy: tuple[Path, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.merge(*toy, tmp_path / "first")

    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, "not here")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    stream.merge(*toy, tmp_path / "second")
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_progress_ends_at_all_of_it(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = stream.merge(*toy, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.nbytes}
    assert report.nbytes - 1200 < seen[-1][0] <= report.nbytes  # the headers are not counted


def test_a_folder_in_use_is_left_alone(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(FileError, match="not empty"):
        stream.merge(*toy, tmp_path / "full")
    with pytest.raises(FileError, match="is a file"):
        stream.merge(*toy, tmp_path / "full" / "thesis.tex")
    with pytest.raises(FileError, match="Not a directory"):
        stream.merge(*toy, tmp_path / "full" / "thesis.tex" / "out")
    (tmp_path / "empty").mkdir()
    stream.merge(*toy, tmp_path / "empty")


def test_a_dtype_that_would_eat_the_adapter_is_told_beforehand(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.randn(256, 256).bfloat16()})
    small = adapter({"a": factors(256, 256, size=0.02)})
    with pytest.warns(LoricaWarning, match=r"stored as bfloat16, .* float16 would lose"):
        report = stream.merge(base, small, tmp_path / "out")
    assert report.worst[0] == "a"
    assert 0.5 < report.worst[1] < 1
    better = stream.merge(base, small, tmp_path / "float32", dtype="float32")
    assert better.worst[1] < 1e-3


@pytest.mark.skipif(not anonymous_memory.STATUS.exists(), reason="needs Linux's /proc")
def test_memory_stays_a_few_blocks_whatever_the_size_of_a_tensor(tmp_path: Path, server: Any) -> None:
    base = write_base(tmp_path / "base", {"a.weight": torch.zeros(8192, 8192, dtype=BFLOAT16)})
    checkpoint.write(adapter({"a": factors(8192, 8192)}), tmp_path / "adapter")
    here, there = server.Pipe(duplex=False)
    process = server.Process(
        target=anonymous_memory.report_growth, args=(base, tmp_path / "adapter", tmp_path / "out", there)
    )
    process.start()
    there.close()
    assert here.recv() < 48 << 20  # the tensor has 128 MiB
    process.join()


def test_entries_of_the_configuration_can_be_given(toy: tuple[Path, Adapter], tmp_path: Path) -> None:
    stream.merge(*toy, tmp_path / "out", config={"id2label": {"0": "bad", "1": "good"}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "toy", "id2label": {"0": "bad", "1": "good"}}
