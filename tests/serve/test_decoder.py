"""The engine for decoders: every answer is what its adapter gives alone, whoever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

from serving import KINDS, Alone, Letters, collect, decoder, greedy, ids_of, prompts, root, write_adapter

import lorica
from lorica.layers.slots import SlotLayer
from lorica.serve import Decoder, EngineDown, Sampling, UnknownAdapter


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_sort_of_adapter_answers_as_alone(
    model: Any, folders: dict[str, Path], alone: Alone, attention: str
):
    """Prompts longer than a step, fewer slots than adapters, and a cache that is too small for all."""
    model.set_attn_implementation(attention)
    names = [None, *folders, *folders]
    asked = prompts(len(names), 1, 60)

    async def serve() -> list[list[int]]:
        settings: dict[str, Any] = {"slots": 4, "batch_tokens": 32, "requests": 8, "cache_tokens": 200}
        async with Decoder(model, adapters=root(folders), watch=0, patience=0, **settings) as engine:
            answers = [engine.admit(ids, name, greedy(9)) for ids, name in zip(asked, names, strict=True)]
            got = await asyncio.gather(*map(ids_of, answers))
            assert engine.stats.evictions_total > 0
            assert engine.leases == engine.blocks_held == 0
            return got

    try:
        got = asyncio.run(serve())
    finally:
        model.set_attn_implementation("sdpa")
    for name, ids, answer in zip(names, asked, got, strict=True):
        assert alone.agrees(folders.get(name or ""), ids, answer, 9)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpt2", {}), ("llama", {"num_key_value_heads": 1}), ("mistral", {}), ("qwen3-moe", {})],
)
def test_other_decoders(name: str, settings: dict[str, Any], tmp_path: Path):
    """Other layers, heads that share keys, a window of keys, experts."""
    own = decoder(name, **settings)
    config = {"r": 4, "target_modules": ["c_attn" if name == "gpt2" else "q_proj"]}
    made = {key: write_adapter(own, tmp_path / key, config, i) for i, key in enumerate("ab")}
    names, asked = [None, "a", "b"] * 3, prompts(9, 1, 70)

    async def serve() -> list[list[int]]:
        async with Decoder(own, adapters=tmp_path, watch=0, batch_tokens=32, requests=6) as engine:
            answers = [engine.admit(ids, n, greedy(8)) for ids, n in zip(asked, names, strict=True)]
            return await asyncio.gather(*map(ids_of, answers))

    alone = Alone(own)
    for adapter, ids, answer in zip(names, asked, asyncio.run(serve()), strict=True):
        assert alone.agrees(made.get(adapter or ""), ids, answer, 8)


@pytest.mark.parametrize(
    ("name", "said"), [("t5", "no decoder"), ("bert", "no decoder"), ("bloom", "attention is its own")]
)
def test_a_model_that_would_ignore_the_cache_is_refused(name: str, said: str):
    with pytest.raises(lorica.LoricaError, match=said):
        Decoder(tiny.transformer(name))


def test_one_adapter_s_cached_prefix_is_not_another_s(model: Any, folders: dict[str, Path], alone: Alone):
    shared = prompts(1, 70, 70, seed=3)[0]
    names = [None, "all", "some", "dora"] * 4
    asked = [[*shared, 3 + i // 4] for i in range(16)]

    async def serve() -> tuple[list[list[int]], int]:
        async with Decoder(model, adapters=root(folders), watch=0, requests=4) as engine:
            got = [await ids_of(engine.admit(ids, n, greedy(6))) for ids, n in zip(asked, names, strict=True)]
            cached = engine.stats.cached_tokens_total
            assert cached == 12 * 64  # all but the first of each adapter find four blocks
            other = await ids_of(engine.admit(asked[0], None, greedy(6), tenant="another"))
            assert engine.stats.cached_tokens_total == cached
            assert other == got[0]
            return got, cached

    got, _ = asyncio.run(serve())
    for name, ids, answer in zip(names, asked, got, strict=True):
        assert alone.agrees(folders.get(name or ""), ids, answer, 6)


def test_200_requests_while_adapters_come_and_go(
    model: Any, folders: dict[str, Path], alone: Alone, tmp_path: Path
):
    """Mixed lengths, shared prefixes, answers that are left, a name reloaded and one unloaded meanwhile."""
    draw = random.Random(7)
    heads = prompts(6, 16, 50, seed=11)
    again = write_adapter(model, tmp_path / "again", KINDS["all"], seed=99)
    last = write_adapter(model, tmp_path / "last", KINDS["some"], seed=98)
    meant: dict[str, Path] = {**folders, "last": last}
    done: list[tuple[Path | None, list[int], int, list[int]]] = []
    left = 0

    async def one(engine: Decoder) -> None:
        nonlocal left
        name = draw.choice([None, *meant])
        ids = draw.choice(heads)[: draw.randint(1, 50)] + prompts(1, 1, 12, draw.random())[0]  # type: ignore[arg-type]
        count = draw.randint(1, 14)
        folder = None if name is None else meant[name]
        await asyncio.sleep(draw.random() * 1.5)
        try:
            folder = None if name is None else meant[name]
            answer = engine.admit(ids, name, greedy(count))
        except (UnknownAdapter, KeyError):
            assert name == "last"
            return
        if draw.random() < 0.15:
            left += 1
            if draw.random() < 0.7:
                await anext(answer)
            await answer.aclose()
            return
        done.append((folder, ids, count, await ids_of(answer)))

    async def disturb(engine: Decoder) -> None:
        await asyncio.sleep(0.5)
        await engine.adapters.load("all", again, replace=True)
        meant["all"] = again
        await asyncio.sleep(0.2)
        meant.pop("last")
        await engine.adapters.unload("last")
        with pytest.raises(UnknownAdapter, match="'last'"):
            engine.admit([3], "last", greedy(1))

    async def serve() -> None:
        store = [root(folders), tmp_path]
        settings: dict[str, Any] = {"slots": 5, "requests": 12, "batch_tokens": 48, "resident": 6}
        async with Decoder(
            model, adapters=store, watch=0, patience=0.05, cache_tokens=600, **settings
        ) as own:
            await asyncio.gather(disturb(own), *(one(own) for _ in range(200)))
            while own.stats.running:  # the last that were left
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)
            assert own.leases == own.blocks_held == 0
            assert own.stats.waiting == 0
            assert own.stats.cached_tokens_total > 0
            assert "last" not in own.stats.mounted

    asyncio.run(serve())
    assert left > 10
    assert len(done) > 140
    assert len({folder for folder, *_ in done}) == 11  # both contents of "all" among them
    wrong = [(folder, ids, got) for folder, ids, n, got in done if not alone.agrees(folder, ids, got, n)]
    assert not wrong


def test_a_name_loaded_again_holds_for_new_requests_alone(
    model: Any, folders: dict[str, Path], alone: Alone, tmp_path: Path
):
    other = write_adapter(model, tmp_path / "other", KINDS["all"], seed=50)
    ids = prompts(1, 40, 40)[0]

    async def serve() -> tuple[list[int], list[int]]:
        store = [root(folders), tmp_path]
        async with Decoder(model, adapters=store, watch=0) as engine:
            first = engine.admit(ids, "all", greedy(40))
            began = await anext(first)
            entry = await engine.adapters.load("all", other, replace=True)
            assert entry.hash != engine.adapters.entry("some").hash
            second = await ids_of(engine.admit(ids, "all", greedy(40)))
            return [t.id for t in began.tokens] + await ids_of(first), second

    first, second = asyncio.run(serve())
    assert alone.agrees(folders["all"], ids, first, 40)
    assert alone.agrees(other, ids, second, 40)
    assert first != second


def test_text_comes_in_whole_characters_and_stops_before_a_stop_text(model: Any):
    async def serve() -> None:
        async with Decoder(model, Letters()) as engine:
            ids = prompts(1, 5, 5)[0]
            plain = await collect(engine.admit(ids, None, greedy(30)))
            text = "".join(step.text for step in plain)
            assert text == Letters().decode([t.id for step in plain for t in step.tokens])
            assert plain[-1].finish == "length"
            stop = text[7:9]
            stopped = await collect(engine.admit(ids, None, greedy(30, stop=(stop, "never"))))
            assert "".join(step.text for step in stopped) == text[: text.index(stop)]
            assert stopped[-1].finish == "stop"
            while engine.stats.running:
                await asyncio.sleep(0.01)
            assert engine.blocks_held == 0
            last = [t.id for step in plain for t in step.tokens][4]
            ended = await collect(engine.admit(ids, None, greedy(30, stop_token_ids=(last,))))
            assert ended[-1].tokens[-1].id == last
            assert ended[-1].finish == "stop"

    asyncio.run(serve())


def test_a_seed_s_answer_does_not_depend_on_the_batch(model: Any, folders: dict[str, Path]):
    drawn = Sampling(max_tokens=12, temperature=1.3, top_p=0.95, seed=5)
    ids = prompts(1, 9, 9)[0]

    async def serve() -> None:
        async with Decoder(model, adapters=root(folders), watch=0) as engine:
            single = await ids_of(engine.admit(ids, "all", drawn))
            others = [engine.admit(p, "some", Sampling(max_tokens=12)) for p in prompts(9, 3, 30)]
            crowd = await asyncio.gather(ids_of(engine.admit(ids, "all", drawn)), *map(ids_of, others))
            assert crowd[0] == single
            other = await ids_of(engine.admit(ids, "all", Sampling(max_tokens=12, temperature=1.3, seed=6)))
            assert other != single

    asyncio.run(serve())


@pytest.mark.parametrize("name", [None, "head"])
def test_logprobs_are_the_model_s_own(model: Any, folders: dict[str, Path], alone: Alone, name: str | None):
    ids = prompts(1, 50, 50)[0]
    asked = greedy(5, logprobs=3, prompt_logprobs=2)

    async def serve() -> list[Any]:
        async with Decoder(model, adapters=root(folders), watch=0, batch_tokens=20, requests=4) as engine:
            nothing = await collect(engine.admit(ids, name, greedy(0, prompt_logprobs=0)))
            assert [step.finish for step in nothing] == ["length"]
            assert len(nothing[0].prompt) == 50
            return await collect(engine.admit(ids, name, asked))

    steps = asyncio.run(serve())
    prompt = [token for step in steps for token in step.prompt]
    answer = [token for step in steps for token in step.tokens]
    logs = alone.logits(folders.get(name or ""), [*ids, *(t.id for t in answer)]).log_softmax(-1)
    assert prompt[0].logprob is None
    for i, token in enumerate([*prompt[1:], *answer]):
        assert token.logprob == pytest.approx(float(logs[i, token.id]), abs=1e-4)
        top = logs[i].topk(len(token.top))
        assert len(token.top) == (2 if i < 49 else 3)
        assert [p for _, p in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_adapters_that_somebody_trains_on_the_model_do_not_act_in_the_engine(
    folders: dict[str, Path], alone: Alone
):
    own, ids = decoder(), prompts(1, 9, 9)[0]

    async def serve() -> None:
        async with Decoder(own, adapters=root(folders), watch=0) as engine:
            before = await ids_of(engine.admit(ids, None, greedy(5)))
            lorica.load(own, folders["some"], "learner", trainable=True)
            assert await ids_of(engine.admit(ids, None, greedy(5))) == before
            assert alone.agrees(folders["all"], ids, await ids_of(engine.admit(ids, "all", greedy(5))), 5)
            with torch.no_grad():  # and those of the engine do not act in training
                expected = alone.logits(folders["some"], ids)
                torch.testing.assert_close(own(torch.tensor([ids])).logits[0], expected)

    asyncio.run(serve())


def test_an_adapter_that_cannot_be_mounted_leaves_the_others_alone(
    model: Any, folders: dict[str, Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
):
    ids = prompts(1, 9, 9)[0]

    async def serve() -> None:
        async with Decoder(model, adapters=root(folders), watch=0) as engine:
            await ids_of(engine.admit(ids, "some", greedy(2)))
            put = SlotLayer.put

            def fail(layer: SlotLayer, *args: Any) -> None:
                if "down_proj" in layer.path:
                    raise MemoryError("no room for larger tables")
                put(layer, *args)

            monkeypatch.setattr(SlotLayer, "put", fail)
            with pytest.raises(EngineDown, match="all: no room"):
                await collect(engine.admit(ids, "all", greedy(5)))
            monkeypatch.undo()
            assert (engine.leases, engine.stats.restarts_total) == (0, 0)
            for name in ("head", "all"):  # the first takes the place that the failure left
                assert alone.agrees(folders[name], ids, await ids_of(engine.admit(ids, name, greedy(5))), 5)

    asyncio.run(serve())
