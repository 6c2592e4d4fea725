"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorica.serve.http.errors import refused
from lorica.serve.http.routes.chat import lay_out
from lorica.serve.http.schemas import Detokenize, Tokenize
from lorica.serve.http.served import key_of, refuse_many, served

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(request: Request, body: Tokenize) -> Response:
    """The tokens of a text or of a conversation."""
    here = served(request)
    adapter = here.adapter(body.model, key_of(request))
    if (body.prompt is None) == (body.messages is None):
        raise refused("give prompt or messages, and not both", "prompt")
    if body.messages is not None:
        ids = await lay_out(here, adapter, body.messages, body)
    else:
        (ids,) = await here.texts.encode([body.prompt or ""], special=body.add_special_tokens is not False)
    words = {"token_strs": here.texts.tokenizer.convert_ids_to_tokens(ids)} if body.return_token_strs else {}
    return JSONResponse({"count": len(ids), "max_model_len": here.limits.context, "tokens": ids, **words})


@router.post("/detokenize")
async def detokenize(request: Request, body: Detokenize) -> Response:
    """The text of tokens."""
    here = served(request)
    here.adapter(body.model, key_of(request))
    refuse_many("tokens", len(body.tokens), here.limits.context, "tokens")
    if unknown := next((token for token in body.tokens if token >= here.limits.vocabulary), None):
        raise refused(f"there is no token {unknown}; ids are below {here.limits.vocabulary:,}", "tokens")
    return JSONResponse({"prompt": await here.texts.decode(body.tokens)})
