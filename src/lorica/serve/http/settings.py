"""Settings of the server: limits of a client, beside the engine's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server.

    Args:
        allow_load: whether adapters may be loaded and unloaded over HTTP.
        body: bytes of a request.
        prompts: prompts, texts or pairs of a request.
        choices: answers to a prompt (`n`).
        answers: prompts × choices.
        messages: messages of a conversation.
        requests: requests at a time.
        per_key: requests of one key at a time.
        read: seconds for a client to send its request.
        keep_alive: seconds between comments in a stream that has nothing to say.
        stalled: seconds after which a client that reads nothing of its stream counts as gone.
    """

    allow_load: bool = False
    body: int = 4 << 20
    prompts: int = 256
    choices: int = 16
    answers: int = 256
    messages: int = 1024
    requests: int = 1024
    per_key: int = 256
    read: float = 60.0
    keep_alive: float = 15.0
    stalled: float = 300.0
