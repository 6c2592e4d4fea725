"""Many adapters with heads of their own in one batch: each as it answers alone."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
import torch
from transformers import AutoModel

import lorica
from lorica.serve.encoder import Base, EncoderEngine
from lorica.serve.encoder import engine as engine_module
from lorica.serve.encoder.batching import batches
from lorica.serve.encoder.engine import Using
from lorica.serve.encoder.rows import Row, rows_of
from lorica.serve.encoder.trunk import Trunk
from lorica.serve.engine import EngineDown, InvalidRequest, Overloaded, RefusedAdapter, UnknownAdapter

Encoder = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def base(encoder: Encoder) -> Base:
    return Base.open(str(encoder[0] / "model"))


def running(
    base: Base, work: Callable[[EncoderEngine], Awaitable[None]], roots: list[Path], **options: Any
) -> EncoderEngine:
    """Run a test's work beside an engine."""

    async def run() -> EncoderEngine:
        engine = EncoderEngine(base, roots, watch=0, **options)
        await engine.start()
        try:
            await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.stop(drain=5)
        return engine

    return asyncio.run(run())


async def outputs(
    engine: EncoderEngine, name: str | None, texts: tuple[str, ...] = encoders.TEXTS
) -> list[np.ndarray]:
    async with engine.using(name) as using:
        rows = rows_of(engine.tokenizer, texts, words=using.head is not None and using.head.kind == "tags")
        return await (using.outputs(rows) if using.head is not None else using.vectors(rows))


def test_each_as_it_answers_alone(encoder: Encoder, base: Base) -> None:
    folder, alone = encoder
    plain = AutoModel.from_pretrained(folder / "model").eval()

    async def work(engine: EncoderEngine) -> None:
        names = [*encoders.LABELS, "vectors", None] * 3
        found = await asyncio.gather(*(outputs(engine, name) for name in names))
        for name, rows in zip(names, found, strict=True):
            for text, got in zip(encoders.TEXTS, rows, strict=True):
                ids = base.tokenizer(text)["input_ids"]
                if name in encoders.LABELS:
                    wanted = encoders.logits(alone[name], ids)
                else:
                    model = plain if name is None else alone[name]
                    with torch.no_grad():
                        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                    wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
                torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-5)
        assert engine.stats.steps_total < len(names) * len(encoders.TEXTS) / 2
        assert {entry.state for entry in engine.adapters.entries()} == {"mounted"}
        assert all(entry.requests == 0 and entry.served == 3 for entry in engine.adapters.entries())

    running(base, work, [folder / "adapters"])
    assert not lorica.adapters(base.model)  # it is as it was


def test_what_is_told(encoder: Encoder, base: Base) -> None:
    async def work(engine: EncoderEngine) -> None:
        for name, labels in encoders.LABELS.items():
            async with engine.using(name) as using:
                rows = rows_of(engine.tokenizer, encoders.TEXTS[:1], words=name == "tags")
                (output,) = await using.outputs(rows)
                assert using.head is not None
                told = using.head.told(output, rows[0])
            if name == "tags":
                assert told["words"] == ["lovely", "film"]
                assert set(told["labels"]) <= set(labels)
                assert "spans" in told
            elif name == "score":
                assert told["score"] == pytest.approx(1 / (1 + np.exp(-output[0])))
            else:
                assert told["labels"] == labels
                assert told["label"] == labels[int(output.argmax())]
                assert sum(told["probs"]) == pytest.approx(1)

    running(base, work, [encoder[0] / "adapters"])


def test_fewer_slots_than_adapters(encoder: Encoder, base: Base) -> None:
    async def work(engine: EncoderEngine) -> None:
        names = [*encoders.LABELS, "vectors"] * 4
        found = await asyncio.gather(*(outputs(engine, name) for name in names))
        assert len(engine.stats.mounted) <= 2
        for i in range(5):
            for other in found[i::5]:
                for one, two in zip(found[i], other, strict=True):
                    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
        assert engine.stats.evictions_total >= 3
        assert not any(entry.requests for entry in engine.adapters.entries())

    running(base, work, [encoder[0] / "adapters"], slots=2)


def test_names_change_under_running_requests(encoder: Encoder, base: Base, tmp_path: Path) -> None:
    folder, alone = encoder
    for name in ("two", "three"):
        shutil.copytree(folder / "adapters" / name, tmp_path / name)
    ids = base.tokenizer(encoders.TEXTS[0])["input_ids"]

    async def work(engine: EncoderEngine) -> None:
        async with engine.using("two") as using:
            rows = [Row(ids)]
            await engine.adapters.load("two", tmp_path / "three", replace=True)
            before = await using.outputs(rows)
            torch.testing.assert_close(
                torch.from_numpy(before[0]), encoders.logits(alone["two"], ids), atol=1e-5, rtol=1e-4
            )
            after = await outputs(engine, "two", encoders.TEXTS[:1])
            torch.testing.assert_close(
                torch.from_numpy(after[0]), encoders.logits(alone["three"], ids), atol=1e-5, rtol=1e-4
            )
            await engine.adapters.unload("two")
            with pytest.raises(UnknownAdapter, match="'two'"):
                await outputs(engine, "two")
            await using.outputs(rows)
        await outputs(engine, "three")
        assert len(lorica.adapters(base.model)) == len(engine.stats.mounted) == 1

    running(base, work, [tmp_path])


def test_what_is_refused(encoder: Encoder, base: Base, tmp_path: Path) -> None:
    model = encoder[0] / "model"
    encoders.adapter(model, tmp_path / "wide", ["x", "y"], r=9)
    encoders.adapter(model, tmp_path / "good", ["x", "y"])
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "good", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "good", other)
    lorica.write(
        lorica.Adapter(
            lorica.LoraConfig(r=2, target_modules=["nowhere"]),
            {"nowhere": lorica.Factors(torch.ones(2, 3), torch.ones(3, 2), 1.0)},
        ),
        other,
    )
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).symlink_to(encoder[0] / "adapters" / "two" / name)

    async def work(engine: EncoderEngine) -> None:
        for name, told in (("wide", "rank is 9"), ("other", "nowhere|none of its modules|head")):
            with pytest.raises(RefusedAdapter, match=told):
                await outputs(engine, name)
            assert engine.adapters.entry(name).state == "refused"
        for path, told in (("pickled", "pickle"), ("out", "link that leaves")):
            with pytest.raises(RefusedAdapter, match=told):
                await engine.adapters.load("new", tmp_path / path)
        with pytest.raises(UnknownAdapter, match="no folder"):
            await engine.adapters.load("new", model)
        assert len(await outputs(engine, "good")) == len(encoders.TEXTS)

    running(base, work, [tmp_path], max_rank=8)


def test_a_row_that_fails_spares_the_others(
    encoder: Encoder, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Trunk.forward

    def sometimes(self: Trunk, rows: list[Row], *more: Any) -> list[np.ndarray]:
        if any(row.ids == [5] for row in rows):
            raise RuntimeError("no")
        return forward(self, rows, *more)

    monkeypatch.setattr(Trunk, "forward", sometimes)

    async def work(engine: EncoderEngine) -> None:
        async with engine.using(None) as using:
            bad = asyncio.create_task(using.vectors([Row([5])]))
            good = await using.vectors([Row([4]), Row([6])])
            assert len(good) == 2
            with pytest.raises(InvalidRequest, match="the model fails on this text"):
                await bad
        assert engine.alive

    running(base, work, [])


def test_full_stopped_and_cancelled(base: Base) -> None:
    async def run() -> None:
        engine = EncoderEngine(base, queue=3)
        plain = Using(engine, None, None, None)
        with pytest.raises(EngineDown):
            await engine.ask([Row([4])], plain, None)
        await engine.start()
        with pytest.raises(Overloaded, match="3 may"):
            await engine.ask([Row([4])] * 4, plain, None)
        gone = asyncio.create_task(engine.ask([Row([4])] * 3, plain, None))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0.05)
        assert engine.stats.waiting == 0
        last = asyncio.create_task(engine.ask([Row([4])], plain, None))
        await asyncio.sleep(0)
        await engine.stop(drain=5)
        assert (await last)[0].shape == (engine.width,)
        assert not engine.alive

    asyncio.run(run())


def test_batches_hold_rows_of_about_one_length() -> None:
    lengths = [4, 100, 5, 110, 5, 90, 4, 4, 5, 4, 4, 4, 50]
    assert [len(batch) for batch in batches(lengths, rows=4, tokens=48, waste=0.2)] == [9, 1, 3]
    found = batches(lengths, rows=4, tokens=16, waste=0.2)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[i] for i in batch]
        assert len(own) <= 4
        assert 1 - sum(own) / (len(own) * max(own)) <= 0.2
    assert [50] in [[lengths[i] for i in batch] for batch in found]


def test_a_row_that_waits_too_long_is_refused(encoder: Encoder, base: Base) -> None:
    async def work(engine: EncoderEngine) -> None:
        forward = engine._trunk.forward

        def slow(*args: Any) -> Any:
            time.sleep(0.3)
            return forward(*args)

        engine._trunk.forward = slow  # type: ignore[method-assign]
        first = asyncio.create_task(outputs(engine, None))
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match=r"waited 0\.1 s"):
            await outputs(engine, None)
        assert len(await first) == len(encoders.TEXTS)
        assert engine.stats.timeouts_total == len(encoders.TEXTS)

    running(base, work, [], wait=0.1)


def test_whatever_fails_is_told_and_the_engine_goes_on(
    encoder: Encoder, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: EncoderEngine) -> None:
        def fail(*_: object) -> Any:
            raise KeyError("batches")

        with monkeypatch.context() as patched:
            patched.setattr(engine_module, "batches", fail)
            with pytest.raises(EngineDown, match="batches"):
                await outputs(engine, None)
        assert engine.alive
        assert len(await outputs(engine, None)) == len(encoders.TEXTS)

    running(base, work, [])
