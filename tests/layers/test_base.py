"""What an adapted layer refuses: a module in no state for it, a weight that is not all there is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
from tiny import Toy, record
from torch import Tensor, nn
from torch.nn.utils import prune

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError, StateError, TargetError


class TestNotYetAdaptable:
    """A module of the right kind in a state in which an update would not act is refused, and left alone."""

    @staticmethod
    def refused(model: nn.Module, target: str, why: str) -> None:
        before = (
            record(model)
            if not any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
            else None
        )
        with pytest.raises(TargetError, match=why):
            lorica.adapt(model, lorica.LoraConfig(target_modules=[target]))
        assert before is None or record(model) == before

    def test_a_forward_replaced_on_the_module_itself(self) -> None:
        model = Toy()
        own = model.head.forward
        model.head.forward = lambda input: own(input)
        self.refused(model, "head", "head: its forward was replaced on the module itself")

    def test_the_same_for_a_module_trained_whole(self) -> None:
        model = Toy()
        own = model.head.forward
        model.head.forward = lambda input: own(input)
        with pytest.raises(TargetError, match="head: its forward was replaced"):
            lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
        adapter = lorica.extract(oracle.adapted(Toy(), "up", modules_to_save=["head"])[0])
        with pytest.raises(TargetError, match="head: its forward was replaced"):
            lorica.attach(model, adapter)

    def test_a_weight_that_is_computed(self) -> None:
        model = Toy()
        nn.utils.parametrizations.weight_norm(model.head)
        self.refused(model, "head", "head: its weight is computed")

    @pytest.mark.parametrize("how", [prune.identity, nn.utils.parametrizations.weight_norm])
    def test_a_bias_that_is_computed(self, how: Callable[..., object]) -> None:
        model = Toy()
        how(model.head, "bias")
        self.refused(model, "head", "head: its bias is computed")

    def test_complex_numbers(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64))
        self.refused(model, "0", "0: its weight is torch.complex64")

    def test_an_attribute_of_its_own_by_the_name_of_the_layers(self) -> None:
        class Scaled(nn.Linear):
            scaling = 0.5

        model = Toy()
        model.head = Scaled(6, 3)
        self.refused(model, "head", "head is a Scaled with scaling of its own")
        adapter = lorica.extract(oracle.adapted(Toy(), "head")[0])
        with pytest.raises(AdapterError, match="head is a Scaled with scaling of its own"):
            lorica.attach(model, adapter)

    def test_a_shape_that_is_not_known_yet(self) -> None:
        self.refused(nn.Sequential(nn.LazyLinear(3)), "0", "0 is a LazyLinear whose shape is not known yet")
        self.refused(
            nn.Sequential(nn.LazyConv1d(3, 2)), "0", "0 is a LazyConv1d whose shape is not known yet"
        )


class Scales(nn.Linear):
    """With a forward and argument names of its own."""

    def forward(self, hidden: Tensor, by: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(hidden) * by


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.Linear(5, 7), {"input": torch.randn(3, 5)}),
        (nn.Conv1d(5, 7, 3), {"input": torch.randn(2, 5, 9)}),
        (nn.Embedding(5, 7), {"input": torch.tensor([1, 2])}),
        (Scales(5, 7), {"by": torch.randn(3, 1), "hidden": torch.randn(3, 5)}),
    ],
)
def test_inputs_have_the_names_that_the_base_gives_them(layer: nn.Module, given: dict[str, Tensor]) -> None:
    model, _ = oracle.adapted(nn.Sequential(layer), "0")
    order = reversed(list(given.values()))
    torch.testing.assert_close(model[0](**given), model[0](*order), rtol=0, atol=0)


class TestForwardsOfTheirOwn:
    """A layer that does more than multiply by its weight cannot take its update into the weight."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Logged(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert input.dim() == 2
            return super().forward(input)

    class Squared(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 2

    @pytest.mark.parametrize("layer", [Doubled(5, 4), Squared(5, 4, 3)])
    def test_merging_is_refused_and_nothing_changes(self, layer: nn.Module) -> None:
        model = nn.Sequential(layer)
        lorica.adapt(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        before, weight = copy.deepcopy(model.state_dict()), layer.weight
        with pytest.raises(StateError, match=r"0: .* does more than multiply by its weight"):
            lorica.merge(model)
        assert layer.weight is weight
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_merging_is_right_where_it_only_multiplies(self) -> None:
        model = nn.Sequential(self.Logged(5, 4))
        lorica.adapt(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        x = torch.randn(3, 5)
        y, random = model(x), torch.get_rng_state()
        lorica.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.get_rng_state(), random)
