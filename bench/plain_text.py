"""Plain text to pretrain a small decoder on: WikiText-2 and novels, cleaned, and the tokens they become.

WikiText comes split into words, its rare words written ``<unk>``. Both are undone as far as they can be:
spaces go back to where print has them, and a sentence with a word missing is left out (46 % of the text), for
a decoder that has read ``<unk>`` writes it. Curly quotes become straight ones and ``_emphasis_`` loses its
marks, so that the few tokens there are stand for words.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SOURCES = ("wikitext2", "books")
END = "<|endoftext|>"

_HEADING = re.compile(r"^\s*(?:= )+(.+?)(?: =)+\s*$")
_SENTENCE = re.compile(r"(?<= [.?!]) (?![a-z])")
# In order: WikiText's marks inside numbers and compounds, then what print joins to the word before or after.
_SPACING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r" @([-,.])@ ", r"\1"),
        (r"(?<=\d) – (?=\d)", "–"),
        (r" ([,.;:?!%)\]])", r"\1"),
        (r"([(\[$£€₹#]) ", r"\1"),
        (r" ('(?:s|t|re|m|ve|ll|d)\b)", r"\1"),
        (r"\b(ca|do|does|did|is|was|are|were|wo|would|could|should|has|have|had) n't\b", r"\1n't"),
        (r'" ([^"]*?) ?"', r'"\1"'),
        (r"(?<=\w) / (?=\w)", "/"),
    ]
]
_QUOTES = str.maketrans("“”‘’", "\"\"''")


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and to be scored on.

    Args:
        train: (tokens,) all training texts in one stream.
        validation: source → (tokens,) of its validation texts.
        bytes_a_token: source → mean bytes of text that a token of these stands for.
    """

    train: np.ndarray
    validation: dict[str, np.ndarray]
    bytes_a_token: dict[str, float]


def documents(data: Path, split: str, source: str) -> Iterator[str]:
    """Cleaned texts of a source, one an article or a chunk of a novel."""
    path = data / source / f"{split}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"no file {path}; set LORICA_DATA to the folder that holds {' and '.join(SOURCES)}")
    clean = clean_wikitext if source == "wikitext2" else clean_book
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from filter(None, (clean(json.loads(line)["text"]) for line in lines))


def clean_wikitext(text: str) -> str:
    """An article as print has it: a heading or a paragraph a line, without sentences that lack a word."""
    lines = []
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            line = heading[1]
        kept = " ".join(part for part in _SENTENCE.split(line.strip()) if "<" not in part)
        for pattern, replacement in _SPACING:
            kept = pattern.sub(replacement, kept)
        lines.append(kept.translate(_QUOTES))
    return "\n".join(filter(None, lines))


def clean_book(text: str) -> str:
    """A chunk of a novel, a paragraph a line."""
    text = re.sub(r"_(\w[^_\n]*)_", r"\1", text).replace("--", "—").translate(_QUOTES)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip(" *"))


def train_tokenizer(texts: Iterable[str], size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of GPT-2's kind: any text has tokens, and one of them ends a text.

    Args:
        texts: what to count pairs in.
        size: tokens, the 256 bytes included.
        context: tokens that the model takes at most.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END, model_max_length=context
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """All texts as one stream of tokens (tokens,) of uint16, each text closed by the end-of-text token."""
    found = tokenizer.backend_tokenizer.encode_batch(list(texts))
    end = end_token(tokenizer)
    return np.concatenate([np.array([*each.ids, end], np.uint16) for each in found])


def end_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends a text."""
    found: int = tokenizer.backend_tokenizer.get_vocab()[END]
    return found


def prepare(data: Path, kept: Path, vocabulary: int, context: int) -> tuple[PreTrainedTokenizerFast, Corpus]:
    """Train the tokenizer and turn the texts into tokens, once; a folder keeps both, whole or not at all.

    Args:
        data: folder of the sources.
        kept: folder to keep them in.
        vocabulary: tokens of the tokenizer.
        context: tokens that the model takes at most.
    """
    if not kept.is_dir():
        texts = {(s, x): list(documents(data, s, x)) for s in ("train", "valid") for x in SOURCES}
        learn = [text for source in SOURCES for text in texts["train", source]]
        print(f"training a tokenizer on {sum(map(len, learn)):,} characters ...", flush=True)
        tokenizer = train_tokenizer(learn, vocabulary, context)
        stage = Path(tempfile.mkdtemp(dir=kept.parent))
        tokenizer.save_pretrained(stage)
        np.save(stage / "train.npy", encode(tokenizer, learn))
        sizes = {}
        for source in SOURCES:
            tokens = encode(tokenizer, texts["valid", source])
            sizes[source] = sum(len(text.encode()) for text in texts["valid", source]) / len(tokens)
            np.save(stage / f"{source}.npy", tokens)
        (stage / "bytes.json").write_text(json.dumps(sizes), encoding="utf-8")
        stage.rename(kept)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kept)
    validation = {source: np.load(kept / f"{source}.npy") for source in SOURCES}
    sizes = json.loads((kept / "bytes.json").read_text(encoding="utf-8"))
    corpus = Corpus(np.load(kept / "train.npy"), validation, sizes)
    print(f"{len(corpus.train):,} tokens to learn from, {sum(map(len, validation.values())):,} to score on")
    return tokenizer, corpus
