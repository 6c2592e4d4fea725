"""PEFT's files, written and read; and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import Toy, adapted, bits
from torch import Tensor, nn

import lorica
from lorica.checkpoint import peft
from lorica.errors import AdapterError, ConfigError, FileError

CONFIG = lorica.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "embed"], modules_to_save=["head"])


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
    return lorica.extract(adapted(Toy(), CONFIG))


@pytest.fixture
def folder(adapter: lorica.Adapter, tmp_path: Path) -> Path:
    return lorica.write(adapter, tmp_path / "adapter")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


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


class TestRefused:
    """What cannot be read, or cannot be meant."""

    def refusal(self, folder: Path, kind: type[Exception]) -> str:
        with pytest.raises(kind) as error:
            lorica.read(folder)
        return str(error.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        assert "it should hold adapter_config.json, and it is not there" in self.refusal(
            tmp_path / "x", FileError
        )
        assert "adapter_config.json, and it has none" in self.refusal(tmp_path, FileError)
        assert not lorica.is_adapter(tmp_path)
        assert not lorica.is_adapter(tmp_path / "x")

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        self.refusal(tmp_path / "x", FileError)
        assert not lorica.is_adapter(tmp_path / "x")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        assert "no adapter_model.safetensors; the adapter was not saved to its end" in self.refusal(
            folder, FileError
        )
        assert not lorica.is_adapter(folder)

    @pytest.mark.parametrize("text", ["", "{", "nonsense", '{"r": 8,}', b"\xff\xfe\x00", "[" * 100_000])
    def test_json_that_is_none(self, folder: Path, text: str | bytes) -> None:
        (folder / "adapter_config.json").write_bytes(text.encode() if isinstance(text, str) else text)
        message = self.refusal(folder, FileError)
        assert "adapter_config.json cannot be read as JSON" in message

    @pytest.mark.parametrize("text", ["[]", "3", '"LORA"', "null"])
    def test_json_that_is_no_object(self, folder: Path, text: str) -> None:
        (folder / "adapter_config.json").write_text(text)
        assert "should hold a JSON object, not a" in self.refusal(folder, FileError)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; this is not a LoRA adapter"),
            ({"use_qalora": True}, "use_qalora=True"),
            ({"layer_replication": [[2, 2]]}, "layer_replication"),
            ({"use_qalora": True}, "use_qalora"),
            ({"rank_patern": {"up": 4}}, "did you mean 'rank_pattern'"),
            ({"r": 0}, "r must be a whole number of at least 1, not 0"),
            ({"r": -2}, "not -2"),
            ({"r": "8"}, "not '8'"),
            ({"r": 2.5}, "not 2.5"),
            ({"r": True}, "not True"),
            ({"lora_alpha": "x"}, "lora_alpha"),
            ({"bias": "some"}, "bias"),
            ({"bias": {"a": 1}}, "bias"),
            ({"task_type": "TRANSLATE"}, "task_type"),
            ({"init_lora_weights": "mica"}, "init_lora_weights"),
            ({"target_modules": 3}, "target_modules"),
            ({"target_modules": []}, "target_modules"),
            ({"target_modules": "up["}, "not a regular expression"),
            ({"rank_pattern": "up"}, "rank_pattern"),
            ({"rank_pattern": [1]}, "rank_pattern"),
            ({"rank_pattern": {"up": "many"}}, "rank_pattern"),
            ({"layers_to_transform": 1.5}, "layers_to_transform"),
            ({"layers_to_transform": ["x"]}, "layers_to_transform"),
            ({"modules_to_save": [1]}, "modules_to_save"),
        ],
    )
    def test_a_configuration_that_cannot_be_meant(
        self, folder: Path, changes: dict[str, Any], said: str
    ) -> None:
        edit_config(folder, **changes)
        message = self.refusal(folder, ConfigError)
        assert message.startswith(f"{folder / 'adapter_config.json'}: ")
        assert said in message

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
    def test_truncated_weights(self, folder: Path, keep: float) -> None:
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else int(keep)])
        assert "adapter_model.safetensors is truncated or damaged" in self.refusal(folder, FileError)

    @pytest.mark.parametrize("data", [b"nonsense" * 100, b"\xff" * 64, b"\x08" + bytes(7) + b"[1, 2, 3"])
    def test_weights_that_are_none(self, folder: Path, data: bytes) -> None:
        (folder / "adapter_model.safetensors").write_bytes(data)
        self.refusal(folder, FileError)

    def test_a_pickle_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "sprung"),)

        (folder / "adapter_model.safetensors").unlink()
        for write in (
            lambda path: torch.save({"x": Trap()}, path),
            lambda path: path.write_bytes(pickle.dumps({"x": Trap()}, protocol=2)),
        ):
            write(folder / "adapter_model.bin")
            assert "adapter_model.bin is truncated or damaged" in self.refusal(folder, FileError)
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("data", [b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02R.", b"", b"PK\x03\x04"])
    def test_a_damaged_pickle(self, folder: Path, data: bytes) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(data)
        assert "adapter_model.bin is truncated or damaged" in self.refusal(folder, FileError)

    @pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"x": 3}, {3: torch.zeros(2)}, "text", None])
    def test_a_pickle_of_something_else(self, folder: Path, content: object) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save(content, folder / "adapter_model.bin")
        assert "adapter_model.bin" in self.refusal(folder, FileError)

    def test_a_truncated_pickle(self, folder: Path) -> None:
        torch.save(tensors_of(folder), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
        for keep in (0, 10, 1000):
            data = (folder / "adapter_model.bin").read_bytes()
            (folder / "adapter_model.bin").write_bytes(data[:keep] if keep < len(data) else data[:-10])
            self.refusal(folder, FileError)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, folder: Path, value: float) -> None:
        edit_weights(folder, lambda t: t["base_model.model.embed.lora_embedding_B"].fill_(value))
        assert "NaN or infinity in embed (B)" in self.refusal(folder, AdapterError)

    def test_everything_that_is_wrong_stands_in_one_list(self, folder: Path) -> None:
        prefix = "base_model.model."

        def spoil(tensors: dict[str, Tensor]) -> None:
            del tensors[f"{prefix}embed.lora_embedding_A"]
            del tensors[f"{prefix}blocks.1.up.lora_B.weight"]
            tensors[f"{prefix}blocks.0.up.lora_A.weight"] = torch.zeros(3, 6)
            tensors["blocks.0.down.lora_A.weight"] = torch.zeros(2, 12)
            tensors[f"{prefix}blocks.0.down.lora_A"] = torch.zeros(2, 12)
            tensors[f"{prefix}blocks.0.down.lora_diag"] = torch.zeros(6)
            tensors[f"{prefix}blocks.1.down.lora_A.weight"] = torch.zeros(2, 12)
            tensors[f"{prefix}blocks.1.down.lora_B.weight"] = torch.zeros(6, 3)

        edit_weights(folder, spoil)
        first, *rest = self.refusal(folder, AdapterError).splitlines()
        assert first == f"{folder}: the weights are not those of an adapter that lorica can use:"
        assert sorted(rest) == sorted(
            [
                "  blocks.0.down.lora_A.weight: does not start with 'base_model.model.'",
                f"  {prefix}blocks.0.down.lora_A: expected '.weight' at its end",
                f"  {prefix}blocks.0.down.lora_diag: belongs to KaSA, which lorica does not support here",
                "  embed: lora_A is missing",
                "  blocks.1.up: lora_B is missing",
                "  blocks.0.up: its rank is 3, but the configuration says r=2",
                "  blocks.1.down: A (2, 12) and B (6, 3) do not share one rank",
            ]
        )

    def test_halves_that_are_none(self, folder: Path) -> None:
        edit_weights(folder, lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.zeros(2)}))
        assert "embed: A (2,) and B (6, 2) are not the two halves of an update" in self.refusal(
            folder, AdapterError
        )

    def test_complex_numbers(self, folder: Path) -> None:
        key = "base_model.model.blocks.0.up.lora_A.weight"
        edit_weights(folder, lambda t: t.update({key: t[key].to(torch.complex64)}))
        assert "blocks.0.up: A (torch.complex64) and B (torch.float32) should be real" in self.refusal(
            folder, AdapterError
        )

    def test_two_keys_for_one_tensor(self, folder: Path) -> None:
        up, head = "base_model.model.blocks.0", "base_model.model.head"
        twice = {
            f"{up}.base_layer.up.lora_A.weight": torch.zeros(2, 6),
            f"{head}.modules_to_save.bias": torch.full((3,), 7.0),
            f"{up}.up.lora_embedding_A": torch.zeros(2, 6),
            f"{up}.up.lora_embedding_B": torch.zeros(12, 2),
        }
        edit_weights(folder, lambda t: t.update(twice))
        message = self.refusal(folder, AdapterError)
        assert "up.lora_A.weight: another key means the same (A), with other values" in message
        assert "bias: another key means the same (head.bias), with other values" in message
        assert "blocks.0.up: has updates of two kinds" in message

    def test_no_update_at_all(self, folder: Path) -> None:
        edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if ".lora_" in name])
        assert "there is no lora_A or lora_B in it" in self.refusal(folder, AdapterError)

    def test_trained_rows_that_were_not_asked_for(self, folder: Path) -> None:
        key = "base_model.model.embed.token_adapter.trainable_tokens_delta"
        edit_weights(folder, lambda t: t.update({key: torch.zeros(2, 6)}))
        assert "trainable_token_indices is not set" in self.refusal(folder, AdapterError)

    @pytest.mark.parametrize("key", ["lora_diag", "lora_velora_embed"])
    def test_tensors_of_other_methods(self, folder: Path, key: str) -> None:
        edit_weights(folder, lambda t: t.update({f"base_model.model.blocks.0.up.{key}": torch.zeros(2)}))
        assert "which lorica does not support here" in self.refusal(folder, AdapterError)
