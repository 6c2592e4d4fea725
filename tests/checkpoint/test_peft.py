"""PEFT's files, written and read."""

from __future__ import annotations

import copy
import json
import resource
import socket
from pathlib import Path

import pytest
import torch
from checkpoint.peft_files import edit_config, tensors_of, trained
from tiny import Toy, adapted, bits, outputs
from torch import nn

import lorica
import lorica.peft
from lorica.checkpoint import peft
from lorica.errors import AdapterError, FileError


class Zoo(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


@pytest.fixture
def adapter() -> lorica.Adapter:
    return trained()


@pytest.fixture
def folder(adapter: lorica.Adapter, tmp_path: Path) -> Path:
    return lorica.write(adapter, tmp_path / "adapter")


def same(one: lorica.Adapter, other: lorica.Adapter) -> bool:
    a, b = one.named_tensors(), other.named_tensors()
    scales = [{path: (f.scale, f.kind) for path, f in side.factors.items()} for side in (one, other)]
    return (
        a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a) and scales[0] == scales[1]
    )


class TestWrite:
    """What is in the folder."""

    def test_three_files(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert lorica.is_adapter(folder)

    def test_configuration_in_pefts_fields(self, folder: Path) -> None:
        text = (folder / "adapter_config.json").read_text()
        data = json.loads(text)
        assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
        assert (
            data.items()
            >= {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 3,
                "lora_dropout": 0.0,
                "use_dora": False,
                "target_modules": ["up", "embed"],
                "exclude_modules": None,
                "bias": "none",
                "use_rslora": False,
                "modules_to_save": ["head"],
                "init_lora_weights": True,
                "rank_pattern": {},
                "alpha_pattern": {},
                "layers_to_transform": None,
                "layers_pattern": None,
                "fan_in_fan_out": False,
                "task_type": None,
                "inference_mode": True,
                "base_model_name_or_path": None,
                "revision": None,
            }.items()
        )

    def test_names_of_tensors(self, folder: Path) -> None:
        assert {name: tuple(t.shape) for name, t in tensors_of(folder).items()} == {
            "base_model.model.embed.lora_embedding_A": (2, 40),
            "base_model.model.embed.lora_embedding_B": (6, 2),
            **{
                f"base_model.model.blocks.{i}.up.lora_{side}.weight": shape
                for i in range(2)
                for side, shape in (("A", (2, 6)), ("B", (12, 2)))
            },
            "base_model.model.head.weight": (3, 6),
            "base_model.model.head.bias": (3,),
        }

    def test_names_in_an_attention_and_of_biases(self, tmp_path: Path) -> None:
        names = ["linear", "conv", "attention"]
        model = adapted(Zoo(), lorica.LoraConfig(r=2, target_modules=names, bias="all"))
        prefix = "base_model.model."
        written = tensors_of(lorica.save(model, tmp_path))
        assert {name.removeprefix(prefix): tuple(t.shape) for name, t in written.items()} == {
            "linear.lora_A.weight": (2, 4),
            "linear.lora_B.weight": (6, 2),
            "linear.base_layer.bias": (6,),
            "conv.lora_A.weight": (2, 2, 3, 3),
            "conv.lora_B.weight": (4, 1, 1, 1),
            "conv.base_layer.bias": (4,),
            "attention.lora_A.weight": (2, 4),
            "attention.lora_B.weight": (12, 2),
            "attention.base_layer.in_proj_bias": (12,),
            "attention.base_layer.out_proj.lora_A.weight": (2, 4),
            "attention.base_layer.out_proj.lora_B.weight": (4, 2),
            "attention.base_layer.out_proj.base_layer.bias": (4,),
            "head.bias": (2,),
        }

    def test_patterns_keep_their_order(self, tmp_path: Path) -> None:
        # Both patterns name `blocks.1.up`, and the first counts: sorted, they would give another scale.
        config = lorica.LoraConfig(
            target_modules=["up", "down"],
            rank_pattern={"up": 3, r"blocks\.1\..*": 5},
            alpha_pattern={"up": 20, r"blocks\.1\..*": 3},
        )
        torch.manual_seed(0)
        base = Toy()
        model = adapted(copy.deepcopy(base), config)
        folder = lorica.save(model, tmp_path / "adapter")
        lorica.peft.LoraConfig(**vars(config)).save_pretrained(tmp_path / "config")
        for place in (folder, tmp_path / "config"):
            data = json.loads((place / "adapter_config.json").read_text())
            assert list(data["alpha_pattern"].items()) == list(config.alpha_pattern.items())
            assert list(data["rank_pattern"].items()) == list(config.rank_pattern.items())
        assert torch.equal(outputs(lorica.load(base, folder)), outputs(model))

    def test_the_same_adapter_gives_the_same_bytes(
        self, adapter: lorica.Adapter, folder: Path, tmp_path: Path
    ) -> None:
        again = lorica.write(adapter, tmp_path / "again")
        for path in folder.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_tensors_keep_their_type(self, dtype: torch.dtype, tmp_path: Path) -> None:
        A, B = torch.randn(2, 3).to(dtype), torch.randn(4, 2).to(dtype)
        config = lorica.LoraConfig(r=2, target_modules=["q"])
        adapter = lorica.Adapter(config, {"q": lorica.Factors(A, B, 4.0)})
        assert same(lorica.read(lorica.write(adapter, tmp_path)), adapter)

    def test_tensors_that_share_memory_or_are_views(self, tmp_path: Path) -> None:
        block = torch.randn(6, 6)
        factors = {
            "a": lorica.Factors(block[:2], block[:, :2], 4.0),
            "b": lorica.Factors(block[:2], block.T[:, 2:4], 4.0),
        }
        adapter = lorica.Adapter(lorica.LoraConfig(r=2, target_modules=["a", "b"]), factors)
        assert same(lorica.read(lorica.write(adapter, tmp_path)), adapter)

    def test_other_files_in_the_folder_stay(self, adapter: lorica.Adapter, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("mine")
        lorica.write(adapter, folder)
        assert (folder / "tokenizer.json").read_text() == "mine"

    def test_numbers_that_are_none_are_not_written(self, adapter: lorica.Adapter, folder: Path) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        adapter.extras["head.bias"][1] = float("nan")
        with pytest.raises(
            AdapterError, match=r"NaN or infinity in head\.bias; the training that made it diverged"
        ):
            lorica.write(adapter, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_the_other_form_of_the_weights_goes(self, adapter: lorica.Adapter, folder: Path) -> None:
        peft.write(adapter, folder, pickled=True)
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.bin",
        }
        assert same(lorica.read(folder), adapter)
        lorica.write(adapter, folder)
        assert not (folder / "adapter_model.bin").exists()

    def test_a_view_is_pickled_without_the_rest_of_its_memory(self, tmp_path: Path) -> None:
        whole = torch.randn(100_000, 3)
        factors = {"q": lorica.Factors(whole[:2], torch.randn(4, 2), 4.0)}
        adapter = lorica.Adapter(lorica.LoraConfig(r=2, target_modules=["q"]), factors)
        assert same(lorica.read(peft.write(adapter, tmp_path, pickled=True)), adapter)
        assert (tmp_path / "adapter_model.bin").stat().st_size < 10_000

    @pytest.mark.parametrize("pickled", [False, True])
    def test_a_full_disk_leaves_the_old_adapter(self, folder: Path, pickled: bool) -> None:
        big = lorica.Factors(torch.zeros(2, 100_000), torch.zeros(1, 2), 1.0)
        adapter = lorica.Adapter(lorica.LoraConfig(r=2, target_modules=["q"]), {"q": big})
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(FileError, match=r"cannot write to "):
                peft.write(adapter, folder, pickled=pickled)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize("pickled", [False, True])
    def test_a_file_where_the_folder_should_be(
        self, adapter: lorica.Adapter, tmp_path: Path, pickled: bool
    ) -> None:
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(FileError, match="cannot write to"):
            peft.write(adapter, tmp_path / "taken", pickled=pickled)
        assert (tmp_path / "taken").read_text() == "mine"

    def test_nothing_touches_the_network(
        self, adapter: lorica.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the network was used")

        for name in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, refuse)
        on_hub = lorica.Adapter(
            adapter.config.replace(base_model_name_or_path="someone/base", revision="main"),
            adapter.factors,
            adapter.extras,
        )
        assert same(lorica.read(lorica.write(on_hub, tmp_path)), adapter)


class TestRead:
    """What comes back."""

    def test_it_is_what_was_written(self, adapter: lorica.Adapter, folder: Path) -> None:
        read = lorica.read(folder)
        assert same(read, adapter)
        assert read.config == adapter.config.replace(inference_mode=True)

    def test_every_kind_of_layer(self, tmp_path: Path) -> None:
        names = ["linear", "table", "conv", "attention"]
        model = adapted(Zoo(), lorica.LoraConfig(r=2, target_modules=names, bias="all", use_rslora=True))
        adapter = lorica.extract(model)
        assert same(lorica.read(lorica.save(model, tmp_path)), adapter)
        assert {path: f.kind for path, f in lorica.read(tmp_path).factors.items()} == {
            "linear": "linear",
            "table": "embedding",
            "conv": "conv",
            "attention": "linear",
            "attention.out_proj": "linear",
        }

    def test_pickled_tensors(self, adapter: lorica.Adapter, folder: Path) -> None:
        torch.save(tensors_of(folder), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
        assert lorica.is_adapter(folder)
        assert same(lorica.read(folder), adapter)

    def test_safetensors_come_first(self, adapter: lorica.Adapter, folder: Path) -> None:
        (folder / "adapter_model.bin").write_text("no pickle at all")
        assert same(lorica.read(folder), adapter)

    def test_what_says_nothing_is_let_pass(self, folder: Path) -> None:
        edit_config(
            folder,
            peft_version="0.21.2",
            auto_mapping=None,
            use_dora=False,
            loftq_config={},
            megatron_core="megatron.core",
            eva_config=None,
            rank_pattern=None,
            invented_tomorrow=None,
        )
        assert lorica.read(folder).lora.r == 2

    @pytest.mark.parametrize(
        "written", [{"peft_version": "0.21.2"}, {"megatron_core": "megatron.core"}], ids=["0.21", "0.17"]
    )
    def test_an_attention_written_by_peft_acted_twice_where_it_was_trained(
        self, written: dict[str, str], tmp_path: Path
    ) -> None:
        model = adapted(Zoo(), lorica.LoraConfig(r=2, target_modules=["attention", "linear"]))
        adapter = lorica.extract(model)
        lorica.save(model, tmp_path)
        edit_config(tmp_path, **written)
        read = lorica.read(tmp_path)
        for path, times in (("attention", 1), ("attention.out_proj", 2), ("linear", 1)):
            assert torch.equal(read.factors[path].B, times * adapter.factors[path].B)
            assert torch.equal(read.factors[path].A, adapter.factors[path].A)
