"""The engine for decoders over its life: it dies, is stopped, and has more to do than room."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

from serving import Alone, collect, greedy, ids_of, prompts, root

import lorica
from lorica.serve import Decoder, EngineDown, Overloaded
from lorica.serve.decoder import batching


def test_an_engine_that_dies_says_so_and_comes_back_once(model: Any, monkeypatch: pytest.MonkeyPatch):
    ids = prompts(1, 9, 9)[0]

    async def serve() -> None:
        async with Decoder(model, watch=0) as engine:
            good = await ids_of(engine.admit(ids, None, greedy(4)))
            running = [engine.admit(ids, None, greedy(140)) for _ in range(3)]
            await anext(running[0])

            def fail(*_: object) -> None:
                raise MemoryError("no room")

            monkeypatch.setattr(engine._schedule, "packed", fail)
            for answer in running:
                with pytest.raises(EngineDown, match="died: no room"):
                    await asyncio.wait_for(collect(answer), 120)
            monkeypatch.undo()
            while not engine.alive:
                await asyncio.sleep(0.01)
            assert await ids_of(engine.admit(ids, None, greedy(4))) == good
            assert engine.stats.restarts_total == 1
            assert engine.leases == engine.blocks_held == 0
            monkeypatch.setattr(engine._schedule, "packed", fail)
            with pytest.raises(EngineDown, match="died"):
                await asyncio.wait_for(collect(engine.admit(ids, None, greedy(4))), 120)
            assert not engine.alive
            with pytest.raises(EngineDown, match="the engine is dead"):
                engine.admit(ids, None, greedy(4))

    asyncio.run(serve())


def test_stopping_lets_requests_finish_or_tells_them(model: Any):
    async def serve(drain: float | None) -> list[Any]:
        engine = Decoder(model, watch=0)
        await engine.start()
        answers = [engine.admit([5, 6, 7], None, greedy(30)) for _ in range(3)]
        tasks = [asyncio.create_task(ids_of(answer)) for answer in answers]
        await asyncio.sleep(0.05)
        await engine.stop(drain=drain)
        with pytest.raises(EngineDown, match="stopped"):
            engine.admit([5], None, greedy(1))
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 120)

    assert [len(own) for own in asyncio.run(serve(30))] == [30, 30, 30]
    assert all(isinstance(own, EngineDown) for own in asyncio.run(serve(None)))


def test_another_version_of_transformers_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "transformers", SimpleNamespace(__version__="5.24.0"))
    with pytest.raises(lorica.LoricaError, match=r"5\.23\.x, and 5\.24\.0 is installed"):
        Decoder(model)


def test_twice_as_many_adapters_as_slots_cost_no_cliff(model: Any, folders: dict[str, Path], alone: Alone):
    names = [*folders] * 4

    async def serve(slots: int) -> tuple[int, int]:
        async with Decoder(model, adapters=root(folders), watch=0, requests=8, slots=slots) as engine:
            for name in folders:
                await engine.adapters.load(name)
            answers = [engine.admit([3 + i], name, greedy(8)) for i, name in enumerate(names)]
            got = await asyncio.gather(*map(ids_of, answers))
            for i, (name, answer) in enumerate(zip(names, got, strict=True)):
                assert alone.agrees(folders[name], [3 + i], answer, 8)
            return engine.stats.steps_total, engine.stats.mounts_total

    enough, mounts = asyncio.run(serve(8))
    assert mounts == 8
    half, mounts = asyncio.run(serve(4))
    assert mounts <= len(names)
    assert half <= 2 * enough


def test_a_request_that_waits_too_long_is_refused(model: Any, folders: dict[str, Path]):
    """For a place in the batch, for a slot, and for an adapter to be read; nothing is held afterwards."""

    async def refused(answer: Any) -> None:
        with pytest.raises(Overloaded, match=r"waited 0\.2 s") as caught:
            await collect(answer)
        assert caught.value.retry_after == 0.2

    async def serve(requests: int, name: str | None) -> None:
        settings: dict[str, Any] = {"requests": requests, "slots": 1, "wait": 0.2, "context": 140}
        async with Decoder(model, adapters=root(folders), watch=0, **settings) as engine:
            await engine.adapters.load("all")
            await engine.adapters.load("some")
            step = engine._schedule.stepped

            def slow() -> None:
                time.sleep(0.02)
                step()

            engine._schedule.stepped = slow
            running = engine.admit([3], "all", greedy(139))
            await anext(running)
            await refused(engine.admit([3], name, greedy(3)))
            assert engine.stats.running == engine.stats.timeouts_total == 1
            engine._schedule.stepped = step
            assert len(await ids_of(running)) == 138

            def fit(*_: object) -> Any:
                time.sleep(1)
                raise ValueError

            engine.adapters.fit = fit
            await refused(engine.admit([3], "head", greedy(3)))
            assert engine.leases == engine.blocks_held == 0

    asyncio.run(serve(1, None))
    asyncio.run(serve(8, "some"))


def test_a_request_that_waits_for_a_slot_is_not_passed_for_ever(model: Any, folders: dict[str, Path]):
    async def serve() -> None:
        async with Decoder(model, adapters=root(folders), watch=0, slots=1, patience=0.05) as engine:
            done = asyncio.Event()

            async def stream(tokens: int) -> int:
                """Requests of one adapter without a pause, until the other one was answered."""
                for count in range(40):
                    if done.is_set():
                        return count
                    await ids_of(engine.admit([3], "all", greedy(tokens)))
                return 40

            async def other() -> None:
                while not engine.stats.running:
                    await asyncio.sleep(0.01)
                await ids_of(engine.admit([3], "some", greedy(3)))
                done.set()

            asked = asyncio.create_task(other())
            counts = await asyncio.gather(*map(stream, (40, 47, 53, 61)))
            await asked
            assert max(counts) < 40

    asyncio.run(serve())
