"""What a model carries: names, the choice of those that act, parameters that take others' places."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lorica import LoraConfig
from lorica.choice import Choice
from lorica.errors import AdapterError, StateError
from lorica.pieces.copies import ParameterCopy
from lorica.state import AdapterState
from lorica.tree import put_at


def state(*names: str, **fields: object) -> AdapterState:
    return AdapterState(configs={name: LoraConfig() for name in names}, **fields)  # pyright: ignore[reportArgumentType]


class TestKnown:
    def test_a_name_that_is_there(self) -> None:
        assert state("topics").known("topics") == "topics"

    def test_one_that_is_not_hears_of_those_there_are(self) -> None:
        with pytest.raises(
            AdapterError, match=r"'topic'; did you mean 'topics'\?; the model has: 'tone', 'topics'"
        ):
            state("tone", "topics").known("topic")

    def test_none_at_all(self) -> None:
        with pytest.raises(AdapterError, match="the model has: none"):
            state().known("topics")


class TestOne:
    def test_the_name_given(self) -> None:
        assert state("a", "b", shared=Choice(("b",))).one("a") == "a"

    def test_the_only_one_though_it_does_not_act(self) -> None:
        assert state("a").one(None) == "a"

    def test_the_only_one_that_acts(self) -> None:
        assert state("a", "b", shared=Choice(("b",))).one(None) == "b"

    @pytest.mark.parametrize("active", [(), ("a", "b")])
    def test_an_open_choice(self, active: tuple[str, ...]) -> None:
        with pytest.raises(AdapterError, match="which adapter\\? The model has 'a', 'b', 'c'"):
            state("a", "b", "c", shared=Choice(active)).one(None)


def test_what_needs_the_base_is_refused_while_merged() -> None:
    state("a").check_unmerged("save")
    with pytest.raises(StateError, match=r"cannot save while 'a' is merged.*lorica.restore"):
        state("a", merged=("a",)).check_unmerged("save")


class TestPlace:
    def test_the_one_that_was_there_comes_back(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        before, new = model[0].bias, Parameter(torch.ones(2))
        assert put_at(model, "0.bias", new) is before
        assert model[0].bias is new

    def test_in_the_root_itself(self) -> None:
        model, new = nn.Linear(2, 2), Parameter(torch.ones(2))
        put_at(model, "bias", new)
        assert model.bias is new


class TestActivate:
    """Two adapters with biases of their own, and one without."""

    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    @pytest.fixture
    def carried(self) -> AdapterState:
        own = {name: {"0.bias": Parameter(torch.full((2,), float(i)))} for i, name in enumerate("ab", 1)}
        own["b"]["1.bias"] = Parameter(torch.full((2,), 3.0))
        pieces = {
            name: [ParameterCopy(path, p) for path, p in copies.items()] for name, copies in own.items()
        }
        return state("a", "b", "plain", pieces=pieces)

    def test_parameters_take_their_places_and_go_again(
        self, model: nn.Sequential, carried: AdapterState
    ) -> None:
        bases = model[0].bias, model[1].bias
        carried.activate(model, ("b",))
        assert model[0].bias is carried.stand_ins("b")["0.bias"]
        assert model[1].bias is carried.stand_ins("b")["1.bias"]
        carried.activate(model, ("a",))
        assert model[0].bias is carried.stand_ins("a")["0.bias"]
        assert model[1].bias is bases[1]
        carried.activate(model, ())
        assert (model[0].bias, model[1].bias) == bases
        assert not carried.originals

    def test_several_at_once(self, model: nn.Sequential, carried: AdapterState) -> None:
        carried.activate(model, ("plain", "a", "plain"))
        assert carried.active == ("plain", "a")
        assert model[0].bias is carried.stand_ins("a")["0.bias"]

    def test_two_with_their_own_version_of_one_parameter(
        self, model: nn.Sequential, carried: AdapterState
    ) -> None:
        carried.activate(model, ("a",))
        with pytest.raises(
            AdapterError, match=r"'plain', 'a', 'b' cannot act together: each brings its own 0\.bias"
        ):
            carried.activate(model, ("plain", "a", "b"))
        assert carried.active == ("a",)
        assert model[0].bias is carried.stand_ins("a")["0.bias"]

    def test_an_unknown_name_changes_nothing(self, model: nn.Sequential, carried: AdapterState) -> None:
        carried.activate(model, ("a",))
        with pytest.raises(AdapterError, match="no adapter is named 'c'"):
            carried.activate(model, ("b", "c"))
        assert carried.active == ("a",)
        assert model[0].bias is carried.stand_ins("a")["0.bias"]

    def test_the_same_name_twice(self, model: nn.Sequential, carried: AdapterState) -> None:
        carried.activate(model, ("a", "a"))
        assert carried.active == ("a",)
