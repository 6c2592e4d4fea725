"""The endpoints: completions, conversations, encoders, tokens, models, and the server's state."""

from __future__ import annotations

from lorica.serve.http.routes import chat, completions, encoders, models, status, tokens

ROUTERS = tuple(module.router for module in (completions, chat, encoders, tokens, models, status))
"""All of them."""
