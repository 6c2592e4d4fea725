"""Requests for samples: those that wait, those that are written, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from lorica.service.engine.base import Base
from lorica.service.engine.drawing import Request, Samples, Writer, advance
from lorica.service.errors import UserError


class Desk:
    """Writes the samples of all requests.

    Args:
        base: the model.
        served: tenant → tokens so far; added to here.
        most: samples that are written at once.
    """

    def __init__(self, base: Base, served: dict[str, int], most: int) -> None:
        """Nothing waits."""
        self._base, self._served, self._most = base, served, most
        self._waiting: deque[Request] = deque()
        self._open: list[Request] = []
        self._writers: list[Writer] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._open)

    def add(self, request: Request) -> None:
        """One more."""
        self._waiting.append(request)

    def advance(self) -> None:
        """A token for each sample that is written, and the prompts of those that begin."""
        self._begin()
        writers, self._writers = self._writers, []
        try:
            advance(self._base, writers)
        except Exception:
            writers = self._apart(writers)
        for writer in writers:
            for row in writer.rows:
                self._pay(row.request, 1)
            if writer.error is not None:
                self._failed(writer, writer.error)
            self._writers += [each for each in (writer, *writer.taken()) if not each.done]
        for request in self._open:
            if not request.left and not request.future.done():
                request.future.set_result(request.samples)
        self._open = [request for request in self._open if not request.future.done()]

    def cancel(self, future: Future[Samples]) -> None:
        """Give up a request; its samples end with the next token."""
        for request in (*self._waiting, *self._open):
            if request.future is future and not future.done():
                future.set_exception(UserError("cancelled by the client"))
        self._waiting = deque(request for request in self._waiting if not request.future.done())

    def end(self) -> Iterator[Request]:
        """Give up; what was asked for."""
        for writer in self._writers:
            writer.abandon()
        yield from (*self._waiting, *self._open)

    def _begin(self) -> None:
        busy = sum(len(writer.rows) for writer in self._writers)
        alike: dict[tuple[int, bool], list[Request]] = {}
        while self._waiting and busy < self._most:
            request = min(self._waiting, key=lambda request: self._served.get(request.tenant, 0))
            self._waiting.remove(request)
            if not request.takes_turn():
                continue
            self._open.append(request)
            alike.setdefault((len(request.prompt), request.scores), []).append(request)
            busy += request.draw.num_samples
            self._pay(request, len(request.prompt))
        for (length, _), requests in alike.items():
            most = self._base.abreast.most(length)
            requests.sort(key=lambda request: id(request.weights))
            self._writers += [
                Writer(self._base, requests[i : i + most]) for i in range(0, len(requests), most)
            ]

    def _apart(self, writers: list[Writer]) -> list[Writer]:
        """Their joint product failed: the request at fault fails alone, the others begin again and go on."""
        asked = list(dict.fromkeys(request for writer in writers for request in writer.asked))
        for writer in writers:
            writer.abandon()
        for request in asked:
            request.begin()
        writers = [Writer(self._base, [request]) for request in asked]
        for writer in writers:
            try:
                advance(self._base, [writer])
            except Exception as own:
                writer.abandon()
                writer.error = own
        return writers

    def _failed(self, writer: Writer, error: Exception) -> None:
        """A request that fails by itself has failed; several are begun again, each by itself."""
        asked = writer.asked
        for request in asked:
            if len(asked) == 1:
                request.future.set_exception(error)
            else:
                request.begin()
                self._writers.append(Writer(self._base, [request]))

    def _pay(self, request: Request, tokens: int) -> None:
        self._served[request.tenant] = self._served.get(request.tenant, 0) + tokens
