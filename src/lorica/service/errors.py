"""The errors of a service for calls that cannot be carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lorica.errors import LoricaError


class UserError(LoricaError, ValueError):
    """A call is wrong as it stands, and would be wrong again; the message names the expected values."""


class QuotaError(UserError):
    """A tenant has used up its quota."""


class GoneError(LoricaError, LookupError):
    """A run, checkpoint, session or future does not exist, or belongs to another tenant."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Read a client's fields: a value of another type or size is the client's error.

    Args:
        what: the request, for the message.

    Raises:
        UserError: a value cannot be read.
    """
    try:
        yield
    except LoricaError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {error}") from None


class ServiceDown(LoricaError, RuntimeError):
    """The engine has stopped, or a call died with it."""
