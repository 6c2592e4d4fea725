"""`/v1/embeddings`, `/classify`, `/score`, `/rerank`: answers of a model that reads texts."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorica.serve.encoder.engine import Using
from lorica.serve.encoder.heads import Head
from lorica.serve.encoder.rows import Row, rows_of
from lorica.serve.http.answers import while_there
from lorica.serve.http.errors import refused
from lorica.serve.http.schemas import Classification, Embedding, Rerank, Score
from lorica.serve.http.served import Served, key_of, refuse_many, served

router = APIRouter(tags=["encoders"])


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: Embedding) -> Response:
    """A vector for each text, pooled and normalized as the model's own configuration says."""
    here, key = served(request), key_of(request)
    adapter = here.adapter(body.model, key)
    encoder = here.encoder
    if body.dimensions is not None and body.dimensions > encoder.width:
        raise refused(
            f"dimensions: the model has {encoder.width}, and {body.dimensions} are asked for", "dimensions"
        )
    rows = await _rows(here, body.input, body.truncate_prompt_tokens)
    async with encoder.using(adapter) as using:
        vectors = await _counted(request, here, adapter, rows, using.vectors(rows))
    found = [_shortened(vector, body.dimensions) for vector in vectors]
    return _answer(
        "embd",
        body.model or here.default or here.model,
        [
            {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
            for i, vector in enumerate(found)
        ],
        rows,
    )


def _shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first dimensions of a vector, as long as it was."""
    if dimensions is None or dimensions == len(vector):
        return vector
    short = vector[:dimensions]
    return short * (np.linalg.norm(vector) / max(float(np.linalg.norm(short)), 1e-12))


def _written(vector: np.ndarray, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


@router.post("/classify")
@router.post("/v1/classify", include_in_schema=False)
async def classify(request: Request, body: Classification) -> Response:
    """The classes of each text, with their probabilities; of each word, for a model that marks words."""
    here, key = served(request), key_of(request)
    adapter = here.adapter(body.model, key)
    async with here.encoder.using(adapter) as using:
        head = _head(using, here, body.model)
        rows = await _rows(here, body.input, body.truncate_prompt_tokens, words=head.kind == "tags")
        outputs = await _counted(request, here, adapter, rows, using.outputs(rows))
    data = [
        {"index": i, **head.told(output, row)}
        for i, (output, row) in enumerate(zip(outputs, rows, strict=True))
    ]
    return _answer("classify", body.model or here.default or here.model, data, rows)


@router.post("/score")
@router.post("/v1/score", include_in_schema=False)
async def score(request: Request, body: Score) -> Response:
    """Scores of pairs of texts: by a head with one output, or by the cosine of their embeddings."""
    one, two = ([given] if isinstance(given, str) else list(given) for given in (body.text_1, body.text_2))
    if len(one) not in (1, len(two)) or not two:
        raise refused(f"text_1 has {len(one)} texts and text_2 {len(two)}; give one, or as many", "text_1")
    pairs = list(zip(one * len(two) if len(one) == 1 else one, two, strict=True))
    scores, rows = await _scores(request, body.model, pairs, body.truncate_prompt_tokens)
    here = served(request)
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    return _answer("score", body.model or here.default or here.model, data, rows)


@router.post("/rerank")
@router.post("/v1/rerank", include_in_schema=False)
async def rerank(request: Request, body: Rerank) -> Response:
    """Documents, the one that goes best with the query first."""
    if not body.documents:
        raise refused("there are no documents", "documents")
    pairs = [(body.query, document) for document in body.documents]
    scores, rows = await _scores(request, body.model, pairs, body.truncate_prompt_tokens)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or len(scores)]
    shown = body.return_documents is not False
    results = [
        {
            "index": i,
            "relevance_score": scores[i],
            **({"document": {"text": body.documents[i]}} if shown else {}),
        }
        for i in order
    ]
    here = served(request)
    answer = {"id": f"rerank-{request.state.id}", "model": body.model or here.default or here.model}
    return JSONResponse({**answer, "results": results, "usage": _usage(rows)})


async def _scores(
    request: Request, model: str | None, pairs: Sequence[tuple[str, str]], cut: int | None
) -> tuple[list[float], list[Row]]:
    here, key = served(request), key_of(request)
    adapter = here.adapter(model, key)
    async with here.encoder.using(adapter) as using:
        head = using.head
        if head is not None and head.kind == "number":
            rows = await _rows(here, [list(pair) for pair in pairs], cut)
            outputs = await _counted(request, here, adapter, rows, using.outputs(rows))
            return [head.number(output) for output in outputs], rows
        if head is not None:
            raise refused(
                f"{model or here.model} has {len(head.labels)} classes, and scores no pairs; ask /classify",
                "model",
            )
        refuse_many("pairs", len(pairs), here.settings.prompts, "text_2")
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        rows = await _rows(here, texts, cut, most=2 * here.settings.prompts)
        vectors = await _counted(request, here, adapter, rows, using.vectors(rows))
        place = {
            text: vector / max(float(np.linalg.norm(vector)), 1e-12)
            for text, vector in zip(texts, vectors, strict=True)
        }
        return [float(place[one] @ place[two]) for one, two in pairs], rows


def _head(using: Using, here: Served, model: str | None) -> Head:
    if using.head is None:
        others = [e.name for e in here.adapters.entries() if e.name != model and e.problem is None][:5]
        hint = f"; ask an adapter that has one, of: {', '.join(others)}" if others else ""
        raise refused(f"{model or here.model} has no head that tells classes{hint}", "model", "no_head")
    return using.head


async def _rows(
    here: Served, given: Any, cut: int | None, *, words: bool = False, most: int | None = None
) -> list[Row]:
    """A request's rows for the model: texts, pairs of texts, or token ids."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise refused("there is no text", "input")
    refuse_many("texts", len(given), most or here.settings.prompts, "input")
    limits = here.limits
    longest = limits.context if cut in (None, -1) else min(cut, limits.context)
    rows = await here.texts.run(
        lambda: rows_of(here.texts.tokenizer, given, words=words, longest=None if cut is None else longest)
    )
    for i, row in enumerate(rows):
        if len(row) > limits.context:
            raise refused(
                f"text {i} has {len(row):,} tokens, and the model takes {limits.context:,}; cut it, or set "
                "truncate_prompt_tokens to -1",
                "input",
            )
        if cut is not None and len(row) > longest:
            raise refused(
                f"text {i} has {len(row)} tokens still, and truncate_prompt_tokens is {cut}: the model's own "
                "marks stay",
                "truncate_prompt_tokens",
            )
        if not len(row):
            raise refused(f"text {i} is empty: it gives no tokens", "input")
        if max(row.ids) >= limits.vocabulary:
            raise refused(f"text {i} has token {max(row.ids)}; ids are below {limits.vocabulary:,}", "input")
    return rows


async def _counted(
    request: Request, here: Served, adapter: str | None, rows: Sequence[Row], work: Any
) -> Any:
    """The engine's answers for rows, with its time and tokens counted."""
    begun = time.perf_counter()
    here.metrics.began(adapter, sum(map(len, rows)))
    found = await while_there(request, work)
    here.metrics.ended("stop", time.perf_counter() - begun)
    return found


def _usage(rows: Sequence[Row]) -> dict[str, int]:
    count = sum(map(len, rows))
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}


def _answer(kind: str, model: str, data: Sequence[Any], rows: Sequence[Row]) -> Response:
    head = {"id": f"{kind}-{time.time_ns():x}", "object": "list", "created": int(time.time()), "model": model}
    return JSONResponse({**head, "data": data, "usage": _usage(rows)})
