"""The engine for decoders.

    admit ──▶ admission ──▶ schedule ──▶ batching (transformers) ──▶ sampling ──▶ answers, text

decoder     `Decoder`: its life, and the seam between event loop and engine's thread
admission   requests refused at the door
schedule    which requests are in the batch, which adapters in the slots
batching    all contact with the insides of transformers' continuous batching
attention   on a CPU: each token looks at its own request's keys alone
sampling    tokens, each request's by its own rules
answers     a request in the engine, its answer in the event loop
text        text from tokens as they come
"""

from __future__ import annotations

from lorica.serve.decoder.decoder import Decoder as Decoder
