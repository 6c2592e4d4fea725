"""FSDP1 around what an adapter holds besides A and B, in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import shake
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lorica
from lorica.errors import StateError
from lorica.peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """An embedding, an attention, an encoder layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.encoder(x + self.attention(x, x, x)[0])
        return self.head(torch.tanh(self.lin(x))).mean(1)


@pytest.mark.parametrize("original", [False, True])
def test_adapting_after_wrapping_is_refused(original: bool) -> None:
    model = Net()
    adapter = lorica.extract(lorica.adapt(Net(), lorica.LoraConfig(r=2, target_modules=["lin"]), seed=0))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    keys = list(wrapped.state_dict())
    for part in (wrapped, model, nn.Sequential(wrapped)):
        with pytest.raises(StateError, match="was wrapped in FullyShardedDataParallel"):
            lorica.adapt(part, lorica.LoraConfig(r=2, target_modules=["lin"]))
        with pytest.raises(StateError, match="was wrapped in FullyShardedDataParallel"):
            lorica.attach(part, adapter)
    assert list(wrapped.state_dict()) == keys


CASES: dict[str, dict[str, Any]] = {
    "factors": {},
    "magnitudes": {"use_dora": True},
    "biases": {"bias": "all"},
}
# Where readers see an adapter's own in a parameter's place, FSDP1 would write that into the base.
REFUSED: dict[str, dict[str, Any]] = {
    "token rows": {"trainable_token_indices": {"embed": [0, 3]}},
    "a whole head": {"modules_to_save": ["head"]},
    "attention": {"target_modules": ["attention", "lin"]},
    "an encoder's layers": {"target_modules": ["linear1", "linear2", "lin"]},
    "a parameter": {"target_parameters": ["head.weight"]},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_the_adapter_are_those_without(case: str) -> None:
    ids = torch.tensor([[0, 3, 5], [7, 1, 2]])
    config = {"r": 2, "target_modules": ["lin"], **CASES[case]}
    plain, wrapped = (get_peft_model(Net(), LoraConfig(**config)) for _ in range(2))
    for model in (plain, wrapped):
        shake(model)
    expected = plain(ids)
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    sharded = FullyShardedDataParallel(wrapped, use_orig_params=True, device_id=torch.device("cpu"))
    y = sharded(ids)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    ours = {
        n.removeprefix("_fsdp_wrapped_module."): p.grad
        for n, p in sharded.named_parameters()
        if p.grad is not None
    }
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
    extracted = lorica.extract(plain.get_base_model())
    for key, tensor in lorica.extract(wrapped.get_base_model()).named_tensors().items():
        torch.testing.assert_close(tensor, extracted.named_tensors()[key])


@pytest.mark.parametrize("case", REFUSED)
def test_what_fsdp_would_write_into_the_base_is_refused(case: str) -> None:
    model = get_peft_model(Net(), LoraConfig(**{"r": 2, "target_modules": ["lin"], **REFUSED[case]}))
    with pytest.raises(StateError, match=r"FullyShardedDataParallel.*fully_shard"):
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
