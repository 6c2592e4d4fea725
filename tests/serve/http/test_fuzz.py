"""Requests that a fuzzer makes of the server's own description: none fails."""

from __future__ import annotations

from typing import Any

import pytest
from endpoints import StandIn
from hypothesis import HealthCheck, settings

from lorica.serve.http import Served, Settings, make_app

schemathesis = pytest.importorskip("schemathesis")


class Always(StandIn):
    """Never stops: the fuzzer starts the application for its description, and not for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = True

    async def stop(self, *, drain: float | None = None) -> None:
        """Go on."""


served = Served("base", Always(), Settings(allow_load=True, keep_alive=5))
app = make_app(served)
described = schemathesis.openapi.from_asgi("/openapi.json", app)


@described.parametrize()
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@pytest.mark.filterwarnings("ignore")
def test_no_request_fails_the_server(case: Any) -> None:
    served.closing = False
    answer = case.call()
    assert answer.status_code < 500, answer.text
    assert answer.status_code != 422
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
