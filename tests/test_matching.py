"""Regular expressions of configurations: Python's own answer, and always an answer."""

from __future__ import annotations

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from lorica.config import LoraConfig, full_match, matches_pattern
from lorica.config.plugins.bounded import _Positions, _Prepared
from lorica.errors import ConfigError

ORDINARY = [
    r".*\.layers\.\d+\..*\.(q|k|v|o)_proj",
    r"(?!.*vision).*(q_proj|v_proj)",
    r"^(?!.*vision)(?!.*audio).*\.(q|v)_proj$",
    r"(.*\.)?(layers\.(0|1|[2-9])\.q)",
    r".*(?<!lm_)head",
    r"(?i).*Q_PROJ",
    r"\w+\.\b.*",
    r"(?i:A)b.*",
    r"[^.]+\.[^.]+",
    r"(x?){3}y",
    r"(ab){1,3}",
    r"a\n?$",
    r".*?b+?",
    r"(?=a)a.*",
    r"((?=a|b)\w)*",
    r"a(?<=a)b(?=c).*",
    r"()*a",
    r"(?m)^a$",
    r"(?s).*",
    r"a||b",
    r"(?!)",
    r"\Aab\Z",
]
ENDLESS = [
    r"(a*)*b",
    r"(a|a)*b",
    r"([a-z_.0-9]*)*X",
    r".*.*.*.*.*.*.*.*X",
    r"(a?){60}a{60}b",
    r"((a{0,50}){0,50}){0,50}b",
    r"(.*)*(.*)*(.*)*X",
    r"((((((a*)*)*)*)*)*)*b",
    r"(?:(a|aa)+)+$b",
    r"(?=(a*)*b)a.*",
    r"(?:a*){100000000}b",
    r"(?<=a)(b*)*c|(a+)+b",
]
WORDS = [
    "a",
    "b",
    "c",
    ".",
    "0",
    "1",
    "q_proj",
    "v_proj",
    "vision",
    "layers",
    "lm_head",
    "\n",
    "Q_PROJ",
    "x",
    "y",
]


@pytest.mark.parametrize("pattern", ORDINARY + [p for p in ENDLESS if "b" in p])
@hypothesis.given(words=st.lists(st.sampled_from(WORDS), max_size=8))
def test_both_ways_give_pythons_answer(pattern: str, words: list[str]) -> None:
    text = "".join(words)
    expected = re.fullmatch(pattern, text) is not None if pattern in ORDINARY else None
    by_positions = _Positions(_Prepared(pattern), text).full_match()
    assert full_match(pattern, text) == by_positions
    if expected is not None:
        assert by_positions == expected


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_left_to_python(pattern: str) -> None:
    assert _Prepared(pattern).is_easy("model.layers.31.self_attn.q_proj")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_every_pattern_comes_to_an_end(pattern: str) -> None:
    assert not full_match(pattern, "a" * 200)
    assert not matches_pattern(pattern, "encoder.layer.11.attention.self.query_projection")


@pytest.mark.parametrize(
    ("pattern", "length"),
    [(r"(\w+)\1*(\w+)*X", 60), (r"(?>(a*)*)b", 60), (r"((a|b?)*c?)*d", 10**5), (r"(a|b?)*c", 10**6)],
)
def test_what_cannot_be_bounded_is_refused(pattern: str, length: int) -> None:
    with pytest.raises(ConfigError, match="it might never end"):
        full_match(pattern, "a" * length)


def test_a_group_referred_to_works_where_it_is_cheap() -> None:
    assert full_match(r"(q|k)\.\1_proj", "q.q_proj")
    assert not full_match(r"(q|k)\.\1_proj", "q.k_proj")


@pytest.mark.parametrize("pattern", ["(", "a{10000000000000}", "(" * 3000 + ")" * 3000, "[z-a]"])
def test_no_expression_at_all(pattern: str) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        full_match(pattern, "a")
    with pytest.raises(ConfigError, match="not a regular expression"):
        LoraConfig(target_modules=pattern)
    with pytest.raises(ConfigError, match="not a regular expression"):
        LoraConfig(rank_pattern={pattern: 2})
