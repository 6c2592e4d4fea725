"""A feature is a file: a kind of piece, an init and a variant that this file alone knows, by every verb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lorica
from lorica import inits, pieces
from lorica.config import LoraConfig, MethodConfig
from lorica.errors import AdapterError, ConfigError
from lorica.find import Target
from lorica.layers import variants
from lorica.piece import Held, Piece, Rows
from lorica.state import AdapterState
from lorica.tree import put_at


@dataclass(frozen=True, kw_only=True)
class GainConfig(MethodConfig):
    """Train one number for each linear layer, by which its bias is multiplied."""

    method: ClassVar[str] = "toy-gain"
    family: ClassVar[Any] = "reparametrisation"

    gain: float = 1.0


class Gain(Piece):
    """The number of one layer; what stands in its bias's place is the base's, times that."""

    places = True

    def __init__(self, path: str, bias: Parameter, gain: float) -> None:
        super().__init__(path)
        self.gain, self.base = Parameter(torch.tensor(gain)), bias

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:
        self.gain.requires_grad = trainable

    def off(self, root: nn.Module, name: str) -> None:
        pass

    def tensors(self, name: str) -> Iterator[Held]:
        yield Held(f"{self.path}.gain", None, self.gain)

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:
        return {f"{self.path}.bias": Parameter(self.base.detach() * self.gain.detach(), requires_grad=False)}

    def claims(self, name: str) -> Mapping[str, Rows]:
        return {f"{self.path}.bias": None}


class Gains(pieces.Kind):
    """Finds the linear layers that have a bias."""

    def find(self, search: pieces.Search) -> Iterable[Piece]:
        (config,) = (method for method in search.methods if isinstance(method, GainConfig))
        for path, module, _ in search.places:
            if isinstance(module, nn.Linear):
                yield Gain(path, module.bias, config.gain)


class Ones(inits.Init):
    """A of ones, B of the rank's part of W0's first columns: taken out of W0."""

    residual: ClassVar[bool] = True

    def factors(
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        (r, d_in), _ = target.factor_shapes(config.rank(target.path))
        weight = inits.base_weight(target).detach()
        return torch.ones(r, d_in), weight[:, :r].clone()


class Doubled(variants.Variant):
    """Twice the product."""

    name: ClassVar[str] = "toy-doubled"

    def effect(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
        return 2 * layer.update(name, x).to(base.dtype)

    def weight(self, layer: Any, name: str, W0: Tensor, folded: Tensor, rows: slice) -> Tensor:
        return 2 * folded - W0


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    kind = pieces.register(Gains(), "toy-gain")
    inits.register("toy-ones", Ones())
    variants.register(Doubled())
    yield
    pieces.KINDS.remove(kind)
    del inits.INITS["toy-ones"], variants.VARIANTS["toy-doubled"]


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def test_a_piece(tmp_path: Path) -> None:
    model, base = net(), net()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    lorica.adapt(model, GainConfig(gain=3.0))
    expected = net()
    for layer in (expected[0], expected[2]):
        layer.bias.data *= 3
    torch.testing.assert_close(model(X), expected(X))
    assert lorica.extract(model).extras.keys() == {"0.gain", "2.gain"}
    assert sum(p.numel() for p in model.lorica_state.parameters_of("default")) == 2
    with lorica.disabled(model):
        torch.testing.assert_close(model(X), base(X))
    lorica.save(model, tmp_path)
    again = lorica.load(net(), tmp_path, "again")
    torch.testing.assert_close(again(X), expected(X))
    lorica.load_weights(again, tmp_path)
    torch.testing.assert_close(again(X), expected(X))
    lorica.merge(model)
    torch.testing.assert_close(model(X), expected(X))
    lorica.restore(model)
    lorica.adapt(model, GainConfig(), "other")
    with pytest.raises(AdapterError, match=r"cannot act together: each brings its own 0\.bias"):
        lorica.active(model, ["default", "other"])
    lorica.detach(model)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    torch.testing.assert_close(model(X), base(X))


def test_a_file_that_lacks_a_tensor_of_it(tmp_path: Path) -> None:
    adapter = lorica.extract(lorica.adapt(net(), GainConfig()))
    adapter.extras.pop("2.gain")  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match=r"missing: 2\.gain"):
        lorica.attach(net(), adapter)


def test_an_init(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="toy-ones")
    model, base = lorica.adapt(net(), config), net()
    torch.testing.assert_close(model(X), base(X))
    A, B = model[0].factor_parameters("default")
    assert bool((A == 1).all())
    torch.testing.assert_close(B.detach(), base[0].weight.detach()[:, :2])
    with torch.no_grad():
        B.add_(0.1)
    y = model(X)
    lorica.save(model, tmp_path)
    torch.testing.assert_close(lorica.load(net(), tmp_path)(X), y)
    torch.testing.assert_close(lorica.load(net(), tmp_path, trainable=True)(X), y)
    lorica.merge(model)
    torch.testing.assert_close(model(X), y)
    lorica.restore(model)
    torch.testing.assert_close(lorica.detach(model)(X), base(X))


def test_a_variant(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, variant="toy-doubled")
    model, base = lorica.adapt(net(), config, seed=1), net()
    plain = lorica.adapt(net(), config.replace(variant=None), seed=1)
    doubled = lorica.adapt(net(), config.replace(variant=None, lora_alpha=2 * config.lora_alpha), seed=1)
    torch.testing.assert_close(model(X), doubled(X))
    assert not torch.allclose(model(X), plain(X))
    torch.testing.assert_close(lorica.delta_weight(model, "0"), 2 * lorica.delta_weight(plain, "0"))
    lorica.save(model, tmp_path)
    again = lorica.load(net(), tmp_path)
    torch.testing.assert_close(again(X), doubled(X))
    report = lorica.merge(again)
    torch.testing.assert_close(again(X), doubled(X))
    assert max(report.layers.values()) < 1e-9
    torch.testing.assert_close(lorica.detach(lorica.restore(again))(X), base(X))


def test_a_variant_beside_another_adapter() -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, variant="toy-doubled")
    model = lorica.adapt(net(), config, seed=1)
    lorica.adapt(model, config.replace(variant=None), "plain", seed=2)
    lorica.active(model, ["default", "plain"])
    W0 = net()[0].weight.detach()
    delta = 2 * lorica.delta_weight(lorica.adapt(net(), config.replace(variant=None), seed=1), "0")
    delta = delta + lorica.delta_weight(lorica.adapt(net(), config.replace(variant=None), seed=2), "0")
    hidden = torch.tanh(X @ (W0 + delta).T + net()[0].bias)
    torch.testing.assert_close(torch.tanh(model[0](X)), hidden)
    y = model(X)
    lorica.merge(model)
    torch.testing.assert_close(model(X), y)


def test_a_variant_that_nobody_registered() -> None:
    with pytest.raises(
        ConfigError, match="variant='toy-doubles' is not registered; did you mean 'toy-doubled'"
    ):
        lorica.adapt(net(), LoraConfig(r=2, target_modules=["0"], variant="toy-doubles"))


def test_what_stands_in_the_base_is_put_back() -> None:
    model = lorica.adapt(net(), GainConfig(gain=2.0))
    lorica.active(model, ())
    assert put_at(model, "0.bias", model[0].bias) is model[0].bias
