"""Embeddings, classes and scores over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import openai
import pytest
from endpoints import call

from lorica.serve.encoder import Base, EncoderEngine
from lorica.serve.http import Served


@pytest.fixture
def url(encoder: tuple[Path, dict[str, Any]], serve: Callable[[Served], str]) -> str:
    folder, _ = encoder
    base = Base.open(str(folder / "model"))
    return serve(Served("tiny", EncoderEngine(base, [folder / "adapters"]), default="two"))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_embeddings(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(
        model="vectors", input=list(encoders.TEXTS)
    )  # asks for base64, and unpacks it
    plain = client.embeddings.create(model="vectors", input=encoders.TEXTS[1], encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1, 2, 3]
    np.testing.assert_allclose(packed.data[1].embedding, plain.data[0].embedding, atol=1e-6)
    assert np.linalg.norm(plain.data[0].embedding) == pytest.approx(1, abs=1e-6)
    assert plain.usage.prompt_tokens == 5
    short = client.embeddings.create(model="tiny", input=[[2, 4, 3]], dimensions=8, encoding_format="float")
    assert len(short.data[0].embedding) == 8
    assert np.linalg.norm(short.data[0].embedding) == pytest.approx(1, abs=1e-6)
    other = client.embeddings.create(model="tiny", input=encoders.TEXTS[1], encoding_format="float")
    assert np.abs(np.subtract(other.data[0].embedding, plain.data[0].embedding)).max() > 1e-4
    for asked, told in (
        ({"input": ""}, None),
        ({"input": []}, "no text"),
        ({"input": "x", "dimensions": 33}, "33"),
        ({"input": [[99]]}, "token 99; ids are below 32"),
        ({"input": "film " * 100}, "102 tokens, and the model takes 64"),
        ({"input": ["x"] * 300}, "300 texts; 256"),
    ):
        if told is not None:
            with pytest.raises(openai.BadRequestError, match=told):
                client.embeddings.create(model="tiny", **asked)  # type: ignore[arg-type]
    cut: Any = {"truncate_prompt_tokens": -1}
    assert (
        client.embeddings.create(model="tiny", input="film " * 100, extra_body=cut).usage.prompt_tokens == 64
    )
    for least in (0, 1):  # the marks around a text are two
        cut = {"truncate_prompt_tokens": least}
        with pytest.raises(openai.BadRequestError, match=f"truncate_prompt_tokens is {least}"):
            client.embeddings.create(model="tiny", input="film film film", extra_body=cut)
    with pytest.raises(openai.BadRequestError, match="reads texts and writes none"):
        client.completions.create(model="tiny", prompt="x")


def test_classes(url: str, encoder: tuple[Path, dict[str, Any]]) -> None:
    base = Base.open(str(encoder[0] / "model"))
    _, _, told = call(f"{url}/classify", {"model": "three", "input": list(encoders.TEXTS)})
    assert told["model"] == "three"
    for text, entry in zip(encoders.TEXTS, told["data"], strict=True):
        wanted = encoders.logits(encoder[1]["three"], base.tokenizer(text)["input_ids"]).softmax(-1)
        np.testing.assert_allclose(entry["probs"], wanted.numpy(), atol=1e-5)
        assert entry["label"] == "abc"[int(wanted.argmax())]
        assert entry["num_classes"] == 3
    _, _, default = call(f"{url}/classify", {"input": "great"})
    assert default["data"][0]["labels"] == ["no", "yes"]
    _, _, tags = call(f"{url}/v1/classify", {"model": "tags", "input": "lovely film"})
    assert tags["data"][0]["words"] == ["lovely", "film"]
    _, _, pair = call(f"{url}/classify", {"model": "two", "input": [["lovely film", "great"]]})
    ids = base.tokenizer("lovely film", "great")["input_ids"]
    wanted = encoders.logits(encoder[1]["two"], ids).softmax(-1)
    np.testing.assert_allclose(pair["data"][0]["probs"], wanted.numpy(), atol=1e-5)
    status, _, body = call(f"{url}/classify", {"model": "tiny", "input": "x"})
    assert (status, body["error"]["code"]) == (400, "no_head")
    assert "an adapter that has one, of: " in body["error"]["message"]


def test_scores(url: str) -> None:
    _, _, told = call(f"{url}/score", {"model": "score", "text_1": "great", "text_2": ["film", "story"]})
    assert [entry["index"] for entry in told["data"]] == [0, 1]
    assert all(0 < entry["score"] < 1 for entry in told["data"])
    _, _, cosine = call(
        f"{url}/score", {"model": "tiny", "text_1": ["film", "great"], "text_2": ["film", "song"]}
    )
    assert cosine["data"][0]["score"] == pytest.approx(1, abs=1e-6)
    assert -1 <= cosine["data"][1]["score"] < 1
    _, _, ranked = call(
        f"{url}/rerank", {"model": "tiny", "query": "film", "documents": ["song", "film"], "top_n": 1}
    )
    assert ranked["results"][0]["index"] == 1
    assert ranked["results"][0]["document"] == {"text": "film"}
    assert call(f"{url}/score", {"model": "three", "text_1": "a", "text_2": "b"})[0] == 400
    assert call(f"{url}/score", {"model": "tiny", "text_1": ["a", "b"], "text_2": "b"})[0] == 400


def test_how_it_is(url: str) -> None:
    told = call(f"{url}/stats")[2]
    assert (told["writes"], told["default"]) == (False, "two")
    call(f"{url}/classify", {"model": "two", "input": "great"})
    told = {entry["id"]: entry for entry in call(f"{url}/stats")[2]["adapters"]}
    assert told["two"]["kind"] == "classes"
    assert told["two"]["rank"] == 4
    assert len(told["two"]["content_hash"]) == 64
