"""The form of rows, by the names of their columns: texts, prompts and answers, conversations, preferences.

known        forms of language models' rows, found and named; `find_form`, `describe_form`
messages     a conversation's messages in any spelling, as chat templates read them
preferences  pairs of answers, judged answers, prompts alone: `find_pairs` and `pairs_of`, and so on

A function ``find_...`` fills in a `DataConfig`'s columns; one ``..._of`` reads the rows by them.
"""

from lorica.train.data.forms.known import describe_form, find_form, holds_messages
from lorica.train.data.forms.messages import Message, as_messages, as_tools
from lorica.train.data.forms.preferences import (
    Asked,
    Judged,
    Pair,
    Said,
    answered_of,
    as_one_kind,
    asked_of,
    find_asked,
    find_judged,
    find_pairs,
    judged_of,
    pairs_of,
)

__all__ = [
    "Asked",
    "Judged",
    "Message",
    "Pair",
    "Said",
    "answered_of",
    "as_messages",
    "as_one_kind",
    "as_tools",
    "asked_of",
    "describe_form",
    "find_asked",
    "find_form",
    "find_judged",
    "find_pairs",
    "holds_messages",
    "judged_of",
    "pairs_of",
]
