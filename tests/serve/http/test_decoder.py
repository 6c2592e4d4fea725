"""The endpoints over the engine for decoders: many clients at once, some of whom leave."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from endpoints import call, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from waiting import PATIENCE, until

import lorica
from lorica.serve import Decoder
from lorica.serve.http import Served

NAMES = ("base", "one", "two", "three")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A small Llama of bytes with three adapters, in two slots."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval()
    for seed, name in enumerate(NAMES[1:]):
        torch.manual_seed(seed)
        lorica.adapt(
            model, lorica.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        lorica.save(model, folder / name, name)
        lorica.detach(model)
    return Decoder(model, tokenizer(), adapters=Path(folder), slots=2, requests=6, batch_tokens=32, watch=0)


def test_many_clients_at_once(engine: Decoder, serve: Callable[[Served], str]) -> None:
    url = serve(Served("base", engine))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:

        def ask(i: int) -> tuple[str, tuple[int, ...], str | None]:
            prompt = "the same beginning of every prompt, then " + "x" * (i % 5)
            told = client.completions.create(
                model=NAMES[i % 4],
                prompt=prompt,
                max_tokens=12,
                temperature=0.8 if i % 3 == 0 else 0,
                seed=i % 4,
                logprobs=0,
            )
            choice = told.choices[0]
            assert choice.logprobs is not None
            return choice.text, tuple(map(len, choice.logprobs.tokens or ())), choice.finish_reason

        def leave(i: int) -> None:
            with client.completions.create(
                model=NAMES[i % 4], prompt="y", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            ) as stream:
                next(iter(stream))

        alone = {i: ask(i) for i in range(20)}
        with ThreadPoolExecutor(12) as pool:
            left = [pool.submit(leave, i) for i in range(6)]
            together = list(pool.map(ask, [i % 20 for i in range(40)]))
            for each in left:
                each.result()
    assert together == [alone[i % 20] for i in range(40)]
    assert len({alone[i][0] for i in (4, 5, 6, 7)}) == 4  # the same prompt but for an x, other adapters
    until(lambda: engine.leases == 0 and engine.blocks_held == 0)
    assert call(f"{url}/health")[0] == 200
    text = call(f"{url}/metrics")[2].decode()
    assert 'lorica:requests_total{adapter="two"}' in text
    assert 'lorica:request_success_total{finished_reason="abort"}' in text
