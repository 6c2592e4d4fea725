"""Files of older versions of PEFT for stacked experts count as those versions computed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorica
import lorica.peft
from lorica.errors import AdapterError

EXPERTS, WIDTH, RANK, SCALE = 3, 4, 2, 1.5


class Experts(nn.Module):
    """Square weights: both layouts fit, so shapes alone cannot tell."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.zeros(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo" if self.is_transposed else "bi,eoi->beo", x, self.up)


class Model(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


# Version of PEFT, whether the module says is_transposed → the sum that it added to the parameter: "e i o" is
# the one for a stack of (experts, d_in, d_out).
COMPUTED = {
    ("", False): "e i o",
    ("", True): "e i o",
    ("0.18.1", False): "e i o",
    ("0.18.1", True): "e i o",
    ("0.19.0", False): "e i o",
    ("0.19.0", True): "e o i",
    ("0.19.1", False): "e o i",
    ("0.19.1", True): "e i o",
    ("0.21.2", False): "e o i",
    ("0.21.2", True): "e i o",
}


@pytest.mark.parametrize(("version", "transposed"), COMPUTED)
def test_a_file_counts_as_its_version_computed(version: str, transposed: bool, tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    A = torch.randn(EXPERTS * RANK, WIDTH, generator=drawn)
    B = torch.randn(WIDTH, RANK * EXPERTS, generator=drawn)
    key = "base_model.model.experts.lora_"
    save_file({f"{key}A.weight": A, f"{key}B.weight": B}, tmp_path / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": [],
        "target_parameters": ["experts.up"],
        "megatron_core": "megatron.core",
    }
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, **({"peft_version": version} if version else {})})
    )
    how = COMPUTED[version, transposed].replace(" ", "")
    As, Bs = A.reshape(EXPERTS, RANK, WIDTH), B.reshape(WIDTH, RANK, EXPERTS)
    expected = SCALE * torch.einsum(f"ore,eri->{how}", Bs, As)

    model = lorica.load(Model(transposed), tmp_path)
    torch.testing.assert_close(model.experts.up, expected)
    through: Any = lorica.peft.PeftModel.from_pretrained(Model(transposed), tmp_path)
    torch.testing.assert_close(through.base_model.model.experts.up, expected)

    lorica.save(model, tmp_path / "new")
    assert torch.equal(lorica.load(Model(transposed), tmp_path / "new").experts.up, model.experts.up)
    adapter = lorica.read(tmp_path)
    if adapter.stacks is not None:
        with pytest.raises(AdapterError, match=r"lorica\.load the adapter on its base"):
            lorica.write(adapter, tmp_path / "value")
