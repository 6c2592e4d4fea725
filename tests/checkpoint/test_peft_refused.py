"""Everything that can be wrong with PEFT's files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.peft_files import edit_config, edit_weights, tensors_of, trained
from torch import Tensor

import lorica
from lorica.errors import AdapterError, ConfigError, FileError, LoricaWarning


@pytest.fixture
def adapter() -> lorica.Adapter:
    return trained()


@pytest.fixture
def folder(adapter: lorica.Adapter, tmp_path: Path) -> Path:
    return lorica.write(adapter, tmp_path / "adapter")


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

    def test_a_field_that_nobody_knows_is_named(self, folder: Path) -> None:
        edit_config(folder, rank_patern={"up": 4})
        with pytest.warns(LoricaWarning, match="rank_patern.*did you mean 'rank_pattern'"):
            lorica.read(folder)

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
