"""Switching: from one merged adapter to another."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from model.merging.trained import CONFIG, WHOLE, model_with, state
from tiny import Toy, adapted, record
from torch import nn

import lorica
from lorica.errors import AdapterError, StateError


class TestSwitch:
    """From one merged adapter to another."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_gives_what_merging_afresh_gives(self, dtype: torch.dtype) -> None:
        model = model_with(WHOLE, CONFIG.replace(target_modules=["up"]), WHOLE, model=Toy(dtype=dtype))
        fresh = {}
        for name in "abc":
            lorica.merge(model, name)
            fresh[name] = state(model)
            lorica.restore(model)
        for name in "abcbacab":
            lorica.switch(model, name)
            assert state(model) == fresh[name]

    def test_it_merges_where_nothing_was_merged(self) -> None:
        model = model_with(CONFIG)
        lorica.switch(model, "a")
        with pytest.raises(StateError, match="'a' is merged"):
            lorica.detach(model)

    @pytest.mark.no_cover  # the same lines ten thousand times
    def test_ten_thousand_switches_do_not_drift(self) -> None:
        model = Toy(dim=4, blocks=1, dtype=torch.bfloat16)
        before = record(model)
        model_with(WHOLE, CONFIG.replace(target_modules=["up"], r=1), model=model)
        merged = {}
        for name in "ab":
            lorica.switch(model, name)
            merged[name] = state(model)
        for i in range(10_000):
            lorica.switch(model, "ab"[i % 2])
        assert state(model) == merged["b"]
        lorica.detach(lorica.restore(model))
        assert record(model)._replace(requires_grad=[]) == before._replace(requires_grad=[])

    @pytest.mark.parametrize("merged_first", [True, False])
    def test_an_unknown_name(self, merged_first: bool) -> None:
        model = model_with(CONFIG)
        if merged_first:
            lorica.merge(model)
        before = record(model)
        with pytest.raises(AdapterError, match="no adapter is named"):
            lorica.switch(model, "c")
        assert record(model) == before

    def test_what_cannot_be_merged_leaves_the_merged_one_in_place(self) -> None:
        model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2))
        adapted(model, lorica.LoraConfig(r=2, target_modules=["0"]), "a")
        adapted(model, lorica.LoraConfig(r=2, target_modules=["0", "1"]), "b")
        lorica.merge(model, "a")
        before = record(model)
        with pytest.raises(StateError, match="1: a convolution with 2 groups cannot be merged"):
            lorica.switch(model, "b")
        assert record(model) == before
        lorica.switch(model, "a")
        lorica.detach(lorica.restore(model))

    def test_numbers_that_are_none_leave_the_merged_one_in_place(self) -> None:
        model = model_with(WHOLE, WHOLE)
        lorica.extract(model, "b").factors["blocks.1.down"].A[0, 0] = float("nan")
        lorica.merge(model, "a")
        before = record(model)
        with pytest.raises(AdapterError, match=r"NaN or infinity in blocks\.1\.down \(A\)"):
            lorica.switch(model, "b")
        assert record(model) == before

    @pytest.mark.parametrize("several", [False, True])
    def test_an_overflow_of_the_weights_own_type_leaves_the_merged_one_in_place(self, several: bool) -> None:
        model = model_with(WHOLE, CONFIG, WHOLE, model=Toy(dtype=torch.float16))
        for factor in ("A", "B"):
            getattr(lorica.extract(model, "c").factors["blocks.1.down"], factor).mul_(1e3)
        lorica.merge(model, ["b", "a"] if several else "a")
        before = record(model)
        with pytest.raises(
            AdapterError, match=r"blocks\.1\.down: the merged weight would hold NaN or infinity"
        ):
            lorica.switch(model, "c")
        assert record(model) == before
        lorica.switch(model, "b")
        lorica.switch(model, "a")
        assert model.get_parameter("head.bias").isfinite().all()

    def test_so_does_one_of_magnitudes(self) -> None:
        model = model_with(
            CONFIG, CONFIG.replace(target_modules=["up"], use_dora=True), model=Toy(dtype=torch.float16)
        )
        magnitude = lorica.extract(model, "b").factors["blocks.0.up"].magnitude
        assert magnitude is not None
        magnitude.fill_(1e6)
        lorica.merge(model, "a")
        before = record(model)
        with pytest.raises(
            AdapterError, match=r"blocks\.0\.up: the merged weight would hold NaN or infinity"
        ):
            lorica.switch(model, "b")
        assert record(model) == before

    def test_rows_that_overflow_leave_the_merged_one_in_place(self) -> None:
        rows = lorica.LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 5]})
        model: Any = model_with(
            CONFIG.replace(target_modules=["up", "down"]), rows, model=Toy(dtype=torch.float16)
        )
        with torch.no_grad():
            model.embed.token_adapter.trainable_tokens_delta["b"].mul_(1e6)
        lorica.merge(model, "a")
        before = record(model)
        with pytest.raises(AdapterError, match="embed: the merged rows would hold NaN or infinity"):
            lorica.switch(model, "b")
        assert record(model) == before
        lorica.restore(model)

    def test_out_of_inference_mode(self) -> None:
        model = model_with(WHOLE, WHOLE)
        lorica.merge(model, "b")
        expected = state(model)
        lorica.restore(model)
        with torch.inference_mode():
            lorica.merge(model, "a")
        lorica.switch(model, "b")
        assert state(model) == expected
        x = torch.randn(2, 6, requires_grad=True)
        model.get_submodule("blocks.0.up")(x).sum().backward()

    def test_an_interrupt_leaves_the_merged_one_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_with(WHOLE, WHOLE)
        lorica.merge(model, "a")
        before = record(model)

        def interrupt(*_: Any) -> Any:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib.import_module("lorica.model.merging.merge"), "other_values", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lorica.switch(model, "b")
        assert record(model) == before
