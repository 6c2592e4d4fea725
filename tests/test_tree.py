"""The modules of a model by their paths: in torch's own order, and told apart by the ends of their names."""

from __future__ import annotations

import pytest
from tiny import Toy, transformer
from torch import nn

import lorica
from lorica.tree import shortest_suffixes, walk


class TestWalk:
    """Every module of the base, as torch itself lists them."""

    @pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5"])
    def test_the_order_is_torchs(self, name: str) -> None:
        model = transformer(name)
        expected = list(model.named_modules())
        assert [(place.path, place.module) for place in walk(model)] == expected
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"))
        assert [(place.path, place.module) for place in walk(model)] == expected

    def test_a_shared_module_stands_where_it_is_first_met(self) -> None:
        shared = nn.Linear(2, 2)
        model = nn.ModuleDict(
            {"a": nn.Sequential(shared), "b": shared, "c": nn.Sequential(nn.ReLU(), shared)}
        )
        assert [(p.path, p.module) for p in walk(model)] == list(model.named_modules())

    def test_a_place_knows_what_holds_it(self) -> None:
        model = Toy()
        assert next(iter(walk(model))) == ("", model, None)
        assert all(
            place.parent is model.get_submodule(place.path.rpartition(".")[0])
            for place in walk(model)
            if place.path
        )


def test_shortest_suffixes_tell_the_chosen_from_the_rest() -> None:
    everything = ["a.q", "b.q", "a.k", "c.d.k", "head"]
    assert shortest_suffixes(["a.q", "b.q"], everything) == ["q"]
    assert shortest_suffixes(["a.k"], everything) == ["a.k"]
    assert shortest_suffixes(["c.d.k", "head"], everything) == ["d.k", "head"]
