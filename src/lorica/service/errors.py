"""The errors of a service for calls that cannot be carried out."""

from __future__ import annotations

from lorica.errors import LoricaError


class UserError(LoricaError, ValueError):
    """A call is wrong as it stands, and would be wrong again; the message names the expected values."""


class QuotaError(UserError):
    """A tenant has used up its quota."""


class GoneError(LoricaError, LookupError):
    """A run, checkpoint, session or future does not exist, or belongs to another tenant."""


class ServiceDown(LoricaError, RuntimeError):
    """The engine has stopped, or a call died with it."""
