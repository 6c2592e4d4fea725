"""transformers' continuous batching, steered from outside: all contact with its insides is in this file.

    Batcher     the manager: its thread, its life and its death
    Inputs      requests of one adapter lie together in a batch
    Processor   between two steps requests come, go and change slots; after one, tokens are told
    Cache       a prefix is found again only by requests of the same namespace
    Runner      tokens are chosen by us, each request by its own rules
    Router      the engine's message about a request that failed

transformers promises none of these names. `tests/serve/test_batching.py` has a test for each; the extra
`serve` pins the version that they hold for, and is raised on purpose.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache, input_outputs, model_runner, utils
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.requests import RequestState

from lorica.errors import MissingExtra, StateError
from lorica.serve.decoder import attention

VERSION = "5.23."
"""The beginning of transformers' version, as the extra `serve` pins it."""


def check_version() -> None:
    """Refuse another version than the one whose insides are known: hooks that nobody calls fail in silence.

    Raises:
        MissingExtra: naming both.
    """
    if not transformers.__version__.startswith(VERSION):
        raise MissingExtra(
            f"the engine steers the insides of transformers {VERSION}x, and {transformers.__version__} is "
            "installed; the right one comes with: pip install 'lorica[serve]'"
        )


def check_model(model: Any) -> None:
    """Refuse a model that would ignore the engine's cache, some of them without an error.

    Raises:
        StateError: it writes no text, keeps a state besides keys and values, or has an attention of its own.
    """
    kind, why = type(model).__name__, None
    generates = hasattr(model, "init_continuous_batching") and model.can_generate()
    if not generates or model.config.is_encoder_decoder:
        why = "it is no decoder"
    elif getattr(model, "_is_stateful", False):
        why = "it keeps a state besides keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        why = "its attention is its own, and would not look into the engine's cache"
    else:
        try:
            cache.group_layers_by_attn_type(model.config.get_text_config())
        except ValueError as error:
            why = str(error)
    if why is not None:
        raise StateError(
            f"{kind} cannot be served by this engine: {why}. It serves decoders that AutoModelForCausalLM "
            "makes, with full or sliding attention"
        )


class Part(NamedTuple):
    """A request's share of a batch.

    Args:
        id: of the request.
        tokens: number of its tokens in the batch, on end.
        answers: whether a new token is chosen for it after this step.
    """

    id: str
    tokens: int
    answers: bool


class Conductor(Protocol):
    """The conductor of a `Batcher`. Everything is called in the engine's thread, but `ended`'s last."""

    def between(self, batcher: Batcher) -> bool:
        """Between two steps: requests may be put and cancelled; returns whether to come again at once."""
        ...

    def order(self, id: str) -> Any:
        """The key that a batch is sorted by: requests of one adapter lie together in it."""
        ...

    def packed(self, parts: Sequence[Part], heads: Sequence[str] | None) -> None:
        """A batch is about to run.

        Args:
            parts: of it, one after the other.
            heads: requests that the entries given to the output head belong to; None where it is given all
                tokens.
        """
        ...

    def choose(self, ids: Sequence[str], logits: Tensor) -> Tensor:
        """Choose the next token of some requests.

        Args:
            ids: of the requests.
            logits: (requests, vocabulary), float32.

        Returns:
            Token ids (requests,).
        """
        ...

    def stepped(self) -> None:
        """A step is over, and the engine knows the tokens that were chosen in it."""
        ...

    def namespace(self, id: str) -> Sequence[int]:
        """Numbers below 2³¹ that are the same for two requests whose prefixes may be shared."""
        ...

    def matched(self, id: str, tokens: int) -> None:
        """So many of a request's tokens were in the prefix cache."""
        ...

    def ended(self, error: BaseException | None) -> None:
        """The engine's thread ends; nothing more is called."""
        ...


class Batcher(api.ContinuousBatchingManager):
    """An engine, for one life: once ended it is not started again, but replaced.

    Args:
        model: a decoder of transformers.
        conductor: its conductor.
        page: tokens in a block of the cache; prefixes are shared block by block.
        blocks: of the cache.
        tokens: in a batch, at most; longer prompts take several steps.
        requests: in a batch, at most.
    """

    def __init__(
        self, model: Any, conductor: Conductor, *, page: int, blocks: int, tokens: int, requests: int
    ) -> None:
        self.conductor = conductor
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=tokens,
            max_requests_per_batch=requests,
            max_blocks_per_request=0,
            # A replayed graph runs no hooks, and two batches in flight have no state to look at between.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        super().__init__(model, GenerationConfig(eos_token_id=-1, do_sample=False), config)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Take attention by request where there is no better: on a CPU, if all layers see all tokens."""
        kinds = cache.group_layers_by_attn_type(model.config.get_text_config())
        self._by_request = model.device.type == "cpu" and list(kinds) == [cache.FULL_ATTENTION]
        self._by_request = self._by_request and attention.take(model)
        if not self._by_request:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """End the thread, and leave the model's attention as it was."""
        thread: Any = self._generation_thread
        # One that has only begun is let begin: transformers warns of it otherwise.
        while self.batch_processor is None and thread is not None and thread.is_alive():
            time.sleep(0.005)
        super().stop(*args, **kwargs)
        if self._by_request:
            self._by_request = False
            attention.give_back(self.model)

    def start(self) -> None:
        """Start the thread; it does not keep a process from ending."""
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="lorica-engine", daemon=True
        )
        self._generation_thread.start()

    def wake(self) -> None:
        """Have `between` called soon, from any thread."""
        self._wake_up_loop.set()

    def put(self, id: str, prompt: Sequence[int], max_tokens: int, ends: Iterable[int]) -> None:
        """Queue a request; in the engine's thread.

        Args:
            id: no other request's, ever.
            prompt: token ids.
            max_tokens: number of tokens to choose at most.
            ends: tokens after which none is.
        """
        state = RequestState(
            request_id=id, initial_tokens=list(prompt), max_new_tokens=max_tokens, eos_token_id=list(ends)
        )
        self._processor.scheduler.add_waiting_request(state)

    def cancel(self, ids: Iterable[str]) -> None:
        """Drop requests and free their blocks, at once; in the engine's thread."""
        processor = self._processor
        for id in ids:
            processor.scheduler.set_request_cancellation(id)
        gone = processor.scheduler.clear_cancelled_requests()
        for state in gone:
            processor.offloading_manager.free_request_cpu_cache(state)
        if gone:  # else new requests would wait for one to finish that is gone
            processor.scheduler.block_new_requests = False

    @property
    def blocks_held(self) -> int:
        """Blocks of the cache that requests hold."""
        processor: Any = self.batch_processor
        if processor is None:
            return 0
        tables = [a.block_table for a in processor.cache.cache_allocators.values()]
        return sum(len(blocks) for table in tables for blocks in list(table.values()))

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        processor: Any = self.batch_processor
        return 0 if processor is None else processor.cache.num_blocks

    @property
    def shares_prefixes(self) -> bool:
        """Whether the model's attention lets requests share blocks."""
        return self.batch_processor is None or self.batch_processor.cache.use_prefix_sharing

    @property
    def _processor(self) -> Processor:
        processor = self.batch_processor
        assert isinstance(processor, Processor)
        return processor

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self.conductor.ended(self.background_thread_status.fatal_error)

    def _create_batch_processor(self) -> Processor:
        processor: Any = super()._create_batch_processor()
        processor.__class__, processor.conductor, processor.batcher = Processor, self.conductor, self
        kinds = {
            "cache": Cache,
            "model_runner": Runner,
            "output_router": Router,
            "inputs_and_outputs": Inputs,
        }
        for part, kind in kinds.items():
            own = getattr(processor, part)
            own.__class__, own.conductor = kind, self.conductor
        self.batch_processor = processor
        processor.model_runner.processor = processor
        return processor


class Processor(api.ContinuousBatchProcessor):
    """The steps, with the conductor's calls between them."""

    conductor: Conductor
    batcher: Batcher

    def prepare_next_batch(self) -> bool:
        """Let requests come and go, then make up the next batch."""
        if self.conductor.between(self.batcher):
            self.batcher.wake()
        return super().prepare_next_batch()

    def parts(self) -> list[Part]:
        """Of the batch that was made up."""
        batch = self.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        return [Part(own.state.request_id, own.query_length, own.has_new_token) for own in batch]

    def _generation_step(self, model: Any) -> None:
        parts = self.parts()
        heads = None
        if self.model_runner.supports_logits_to_keep(model):
            # As many entries as requests: those after the new tokens' are padding, and are the first token.
            heads = [part.id for part in parts if part.answers]
            heads += [parts[0].id] * (len(parts) - len(heads))
        self.conductor.packed(parts, heads)
        batch = self.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        self.cache.spans = [(own.query_length, own.state.position_offset) for own in batch]  # type: ignore[attr-defined]
        super()._generation_step(model)

    def update_batch(self) -> None:
        """Have the engine take note of the chosen tokens, then tell them."""
        super().update_batch()
        self.conductor.stepped()


class Inputs(input_outputs.ContinuousBatchingIOs):
    """The batch, in the conductor's order."""

    conductor: Conductor

    def prepare_batch_tensors(self, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        """Write down a batch that was made up."""
        ordered = sorted(requests_in_batch, key=lambda own: self.conductor.order(own.state.request_id))
        super().prepare_batch_tensors(ordered, *args, **kwargs)


class Runner(model_runner.ModelRunner):
    """Chooses tokens by the conductor."""

    conductor: Conductor
    processor: Processor

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        ids = [part.id for part in self.processor.parts() if part.answers]
        if ids:
            chosen = self.conductor.choose(ids, scores[0, : len(ids)])
            output_ids[0, : len(ids)].copy_(chosen)


class Cache(cache.PagedAttentionCache):
    """Blocks are found again by their content: by their tokens and the namespace.

    transformers goes by the tokens alone, and would give one adapter's keys and values to another. The first
    tokens, by which all later blocks are chained, are told apart here before they are looked up.
    """

    conductor: Conductor

    def _named(self, id: str, tokens: Sequence[int]) -> list[int]:
        space = self.conductor.namespace(id)
        return [token ^ word for token, word in zip(tokens, space, strict=False)] + list(tokens[len(space) :])

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Number of the prompt's tokens in the cache, for this namespace."""
        found = super().search_prefix_match(request_id, self._named(request_id, prompt_ids))
        if found:
            self.conductor.matched(request_id, found)
        return found

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Note the content of the blocks that were filled, for this namespace."""
        if not complete_blocks:
            return
        tokens = self._named(state.request_id, state.initial_tokens + state.generated_tokens)
        named: Any = SimpleNamespace(
            request_id=state.request_id, status=state.status, initial_tokens=tokens, generated_tokens=[]
        )
        super().mark_complete_blocks(named, complete_blocks)


class Router(api.OutputRouter):
    """Answers are told token by token elsewhere; the engine's own, which repeat them, are dropped."""

    conductor: Conductor

    def deliver(self, output: Any) -> None:
        """Nothing: clients that wait learn of a failure when the thread ends."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Nothing: a request's last token has been told."""


def bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that the cache holds for a token."""
    config = model.config.get_text_config()
    width = utils.find_num_key_value_heads(config) * utils.find_head_dim(config)
    return 2 * config.num_hidden_layers * width * model.dtype.itemsize


def capacity(page: int, blocks: int) -> int:
    """Tokens of one request that surely fit into the cache by themselves."""
    return page * (blocks - 1)


@torch.no_grad()
def prompt_logits(model: Any, prompt: Sequence[int], chunk: int) -> Iterable[Tensor]:
    """The logits of every token of a prompt, outside the batch, some tokens at a time.

    Args:
        model: the decoder.
        prompt: token ids.
        chunk: tokens in a pass.

    Yields:
        (tokens, vocabulary), float32.
    """
    from transformers import DynamicCache

    past = DynamicCache(config=model.config)
    for start in range(0, len(prompt), chunk):
        ids = torch.tensor([prompt[start : start + chunk]], device=model.device)
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        yield out.logits[0].float()
