"""OpenAI's error object, and which error of ours has which status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorica.errors import LoricaError
from lorica.plain import visible
from lorica.serve.engine import EngineDown, InvalidRequest, Overloaded, RefusedAdapter, UnknownAdapter

LEFT = 499
"""The status of an answer that nobody waits for any more; it stands in the log alone."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_SHOWN = 2000


class ApiError(LoricaError):
    """The error that a client gets.

    Args:
        status: of HTTP.
        message: the fault, and the way to mend it.
        param: the field of the request that it is about.
        code: a word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Make one."""
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """The object that OpenAI's clients read."""
        text = visible(str(self))
        return {
            "error": {
                "message": text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ...",
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        wait = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return {**wait, **({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it stands: 400."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client gets for one of ours, or for any other."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownAdapter):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", retry_after=error.retry_after)
    if isinstance(error, EngineDown):
        return ApiError(503, str(error), code="engine_down", retry_after=error.retry_after)
    if isinstance(error, RefusedAdapter):
        return refused(str(error), "model", "adapter_refused")
    if isinstance(error, InvalidRequest):
        return refused(str(error), error.param)
    if isinstance(error, LoricaError):
        return refused(str(error))
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Have every error of an application answered by OpenAI's object."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return _malformed(error).response()

    @app.exception_handler(HTTPException)
    async def by_http(request: Request, error: HTTPException) -> JSONResponse:
        headers: Mapping[str, str] = error.headers or {}
        status = error.status_code if error.status_code != 422 else 400
        message = {
            404: f"there is no {request.url.path} here; /openapi.json lists what there is",
            405: f"{request.url.path} does not take {request.method}",
        }.get(status, str(error.detail))
        answer = ApiError(status, message).response()
        answer.headers.update(headers)
        return answer

    @app.exception_handler(LoricaError)
    async def ours(request: Request, error: LoricaError) -> JSONResponse:
        return as_api_error(error).response()


def _malformed(error: RequestValidationError) -> ApiError:
    """The first field of a request that is wrong, and the number of others."""
    found = error.errors()
    first: Mapping[str, Any] = found[0]
    if first["type"] == "json_invalid":
        return refused("the body is no JSON that can be read", code="invalid_json")
    if first["type"] == "missing" and first["loc"] == ("body",):
        return refused("the request has no body; give a JSON object as application/json")
    field = first["loc"][1:2]
    own = [each for each in found if each["loc"][1:2] == field]
    if len({each["loc"][1:] for each in own}) == 1 or len(own) == 1:
        place, told = first["loc"][1:], str(first["msg"])
    else:  # the field may be one of several things, and each says why it is not that
        place, told = (
            field,
            " or: ".join(dict.fromkeys(str(each["msg"]).removeprefix("Input ") for each in own)),
        )
    param = ".".join(map(str, place)) or None
    others = len({each["loc"][1:2] for each in found}) - 1
    more = f" (and {others} more fields)" if others > 0 else ""
    message = told.removeprefix("Value error, ")
    return refused(f"{param}: {message}{more}" if param else message, param)
