"""What is refused at the door, with what was expected and what came; the engine goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

from serving import CONTEXT, Letters, decoder, greedy, ids_of

from lorica import LoricaError
from lorica.serve import Decoder, InvalidRequest, Overloaded, Sampling, UnknownAdapter

REFUSED: list[tuple[list[Any], dict[str, Any], str, str]] = [
    ([], {}, "prompt", "empty"),
    ([40], {}, "prompt", "token id 40; they are whole numbers from 0 to 39"),
    ([3, -1], {}, "prompt", "token id -1"),
    ([3, 2.0], {}, "prompt", "token id 2.0"),
    ([3, True], {}, "prompt", "token id True"),
    ([10**30], {}, "prompt", "token id 1000"),
    ([3] * CONTEXT, {}, "prompt", f"prompt has {CONTEXT} tokens and max_tokens is 16; together.*{CONTEXT}"),
    ([3], {"max_tokens": CONTEXT}, "max_tokens", f"at most {CONTEXT}"),
    ([3], {"max_tokens": 10**9}, "max_tokens", "1,000,000,000"),
    ([3], {"max_tokens": 0}, "max_tokens", "answers nothing"),
    ([3], {"max_tokens": -1}, "max_tokens", "whole number from 0 on, not -1"),
    ([3], {"max_tokens": 1.5}, "max_tokens", "not 1.5"),
    ([3], {"temperature": -0.1}, "temperature", "from 0 to"),
    ([3], {"temperature": float("nan")}, "temperature", "not nan"),
    ([3], {"temperature": "hot"}, "temperature", "not hot"),
    ([3], {"top_p": 0}, "top_p", "above 0"),
    ([3], {"top_p": 1.1}, "top_p", "from 0 to 1"),
    ([3], {"top_k": -1}, "top_k", "not -1"),
    ([3], {"min_p": 2}, "min_p", "from 0 to 1"),
    ([3], {"presence_penalty": float("inf")}, "presence_penalty", "not inf"),
    ([3], {"frequency_penalty": 1e9}, "frequency_penalty", "to 1000"),
    ([3], {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ([3], {"seed": 2**70}, "seed", "whole number"),
    ([3], {"logprobs": 10**6}, "logprobs", "from 0 to 20"),
    ([3], {"prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
    ([3], {"stop": ("x",) * 10_000}, "stop", "10,000 entries; at most 16"),
    ([3], {"stop": ("",)}, "stop", "1 to 256 characters"),
    ([3], {"stop": ("x" * 300,)}, "stop", "1 to 256 characters"),
    ([3], {"stop_token_ids": (40,)}, "stop_token_ids", "token id 40"),
    ([3], {"logit_bias": ((40, 1.0),)}, "logit_bias", "token id 40"),
    ([3], {"logit_bias": ((4, float("nan")),)}, "logit_bias", "not nan"),
    ([3], {"logit_bias": tuple((4, 1.0) for _ in range(301))}, "logit_bias", "at most 300"),
]


def test_what_would_kill_or_fool_the_engine_is_refused_and_it_goes_on():
    async def serve() -> None:
        async with Decoder(decoder(), Letters(), cache_tokens=CONTEXT + 200) as engine:
            before = await ids_of(engine.admit([3, 4], None, greedy(4)))
            for prompt, fields, param, said in REFUSED:
                with pytest.raises(InvalidRequest, match=said) as caught:
                    engine.admit(prompt, None, Sampling(**fields))
                assert caught.value.param == param, (fields, caught.value.param)
            assert engine.leases == engine.stats.running == engine.stats.waiting == 0
            # What just fits does, by itself and beside others.
            longest = [engine.admit([3] * (CONTEXT - 5), None, greedy(5)) for _ in range(3)]
            assert [len(own) for own in await asyncio.gather(*map(ids_of, longest))] == [5, 5, 5]
            assert await ids_of(engine.admit([3, 4], None, greedy(4))) == before
            assert engine.stats.restarts_total == 0

    asyncio.run(serve())


def test_a_prompt_that_the_cache_has_no_room_for_is_refused():
    async def serve() -> None:
        async with Decoder(decoder(), cache_tokens=64) as engine:
            assert engine.limits.context == 64
            with pytest.raises(InvalidRequest, match="at most 64"):
                engine.admit([3] * 60, None, greedy(8))
            fits = [engine.admit([3 + i] * 20, None, greedy(44)) for i in range(4)]
            assert [len(own) for own in await asyncio.gather(*map(ids_of, fits))] == [44] * 4

    asyncio.run(serve())
    with pytest.raises(LoricaError, match="knows 160 positions"):
        Decoder(decoder(), context=1000)


def test_a_full_queue_and_an_unknown_name_are_told_at_once():
    async def serve() -> None:
        async with Decoder(decoder(), queue=2, requests=2) as engine:
            answers = [engine.admit([3], None, greedy(100)) for _ in range(4)]
            with pytest.raises(Overloaded, match="4 requests") as caught:
                engine.admit([3], None, greedy(1))
            assert caught.value.retry_after > 0
            with pytest.raises(UnknownAdapter, match="'nobody'; there are none"):
                engine.adapters.entry("nobody")
            for answer in answers:
                await answer.aclose()
            while engine.stats.running or engine.stats.waiting:
                await asyncio.sleep(0.01)
            assert len(await ids_of(engine.admit([3], None, greedy(2)))) == 2
            with pytest.raises(InvalidRequest, match="need a tokenizer"):
                engine.admit([3], None, greedy(2, stop=("x",)))

    asyncio.run(serve())


def test_an_answer_that_nobody_holds_is_cancelled():
    async def serve() -> None:
        async with Decoder(decoder()) as engine:
            answer = engine.admit([3], None, greedy(150))
            await anext(answer)
            del answer
            while engine.stats.running or engine.blocks_held:
                await asyncio.sleep(0.01)
            assert engine.stats.generated_tokens_total < 150

    asyncio.run(serve())
