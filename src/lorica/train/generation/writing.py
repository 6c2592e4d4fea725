"""Prompts in, texts out: in batches of similar lengths, padded on the side that a decoder needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.errors import ConfigError, LoricaError, nearest
from lorica.model import mixed
from lorica.train.generation.config import GenerationConfig
from lorica.train.positions import positions_of

_OWN = ("num_return_sequences", "max_length", "use_cache")
_SAMPLING = ("temperature", "top_k", "top_p")
_SEARCHING = ("length_penalty",)


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    adapters: Sequence[str | None] | None = None,
    sequences: int = 1,
    seed: int = 0,
    streamer: Any = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """Write on from prompts.

    Args:
        model: a decoder, or an encoder and decoder. In evaluation meanwhile.
        tokenizer: its tokenizer.
        prompts: tokens of each prompt.
        config: how to write.
        adapters: name of the adapter that answers each prompt, or None for the base; without it, those that
            are active.
        sequences: texts for each prompt; more than one needs beams or sampling.
        seed: seed of the drawing, which leaves torch's own random numbers as they were.
        streamer: takes the tokens of a single prompt as they come; see transformers' TextStreamer.
        progress: called with how many prompts are done.

    Returns:
        For each prompt its texts, the prompt left out.

    Raises:
        LoricaError: the model writes no text, or a prompt and what is to be written pass its context.
    """
    settings = settings_of(model, tokenizer, config, sequences)
    check_context(model, prompts, config)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts: list[list[str]] = [[] for _ in prompts]
    both = bool(model.config.is_encoder_decoder)
    with _evaluating(model), _drawing(config.do_sample, seed):
        for start in range(0, len(order), config.batch_size):
            places = order[start : start + config.batch_size]
            batch = pad([prompts[i] for i in places], _padding(tokenizer), left=not both)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            chosen = None if adapters is None else mixed(model, [adapters[i] for i in places])
            with chosen or contextlib.nullcontext():
                found: Any = model.generate(**batch, generation_config=settings, streamer=streamer)  # type: ignore[operator]
            if not both:
                found = found[:, batch["input_ids"].shape[1] :]
            said = tokenizer.batch_decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in enumerate(said):
                texts[places[row // sequences]].append(text.strip())
            progress(start + len(places))
    return texts


def settings_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    sequences: int = 1,
) -> transformers.GenerationConfig:
    """What transformers' `generate` is asked for: texts end with the model's tokens or the tokenizer's.

    Raises:
        ConfigError: the model writes no text, or the settings contradict each other.
    """
    if not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} does not write text; take a model with a language-modelling head "
            "(AutoModelForCausalLM or AutoModelForSeq2SeqLM loads one)"
        )
    if sequences < 1 or (sequences > 1 and not config.do_sample and config.num_beams < sequences):
        raise ConfigError(
            f"{sequences} different texts a prompt need do_sample, or at least as many beams; num_beams is "
            f"{config.num_beams}"
        )
    known = transformers.GenerationConfig().to_dict()
    for name in config.arguments:
        if name in _OWN or hasattr(config, name):
            raise ConfigError(f"generation.arguments must not hold {name!r}, which has a place of its own")
        if name not in known:
            raise ConfigError(f"transformers' GenerationConfig has no {name!r}{nearest(name, known)}")
    # transformers remarks on settings that have no effect.
    idle = {*(() if config.do_sample else _SAMPLING), *(_SEARCHING if config.num_beams == 1 else ())}
    names = ("max_new_tokens", "num_beams", "no_repeat_ngram_size", "repetition_penalty", "do_sample")
    chosen = {name: getattr(config, name) for name in (*names, *_SAMPLING, *_SEARCHING) if name not in idle}
    own: Any = model.generation_config
    tokens = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    ends = tokens.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    # What is learned ends with the tokenizer's, which may be none of the model's.
    ends += [end for end in [tokenizer.eos_token_id] if end is not None and end not in ends]
    tokens["eos_token_id"] = ends or None
    if tokens.get("pad_token_id") is None:
        tokens["pad_token_id"] = ends[0] if ends else None
    return transformers.GenerationConfig(
        **{**tokens, **chosen, "num_return_sequences": sequences, **config.arguments}
    )


def check_context(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    """Refuse prompts that leave no room for what is to be written.

    Raises:
        LoricaError: naming the first, its tokens and the model's.
    """
    places = positions_of(model.config)
    empty = next((row for row, ids in enumerate(prompts) if not len(ids)), None)
    if empty is not None:
        raise LoricaError(f"prompt {empty + 1} gives no tokens, so there is nothing to write on from")
    if places is None:
        return
    new = 0 if model.config.is_encoder_decoder else config.max_new_tokens
    for row, ids in enumerate(prompts):
        if len(ids) + new > places:
            more = f" and {new:,} more are to be written" if new else ""
            raise LoricaError(
                f"prompt {row + 1} has {len(ids):,} tokens{more}; the model takes {places:,}. Shorten the "
                "prompt, or lower max_new_tokens"
            )


def pad(rows: Sequence[Sequence[int]], token: int, *, left: bool) -> dict[str, Tensor]:
    """Tokens (rows, longest) and their mask; a decoder's prompts end where its text begins, so left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), token)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # The mask hides it: any token will do where there is none of its own.
    token: Any = tokenizer.pad_token_id
    return 0 if token is None else token


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _drawing(sampled: bool, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.manual_seed(seed)
        yield
