"""The forms that rows of instructions, conversations and texts have, known by the names of their columns.

Alpaca      system, instruction, input → output
Dolly       instruction, context → response
OpenOrca    system_prompt, question → response
plain       prompt → completion, question → answer, ...; texts or messages
messages    messages, conversations: what the assistant says
raw text    text, content: all of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datasets import Dataset, List

from lorica.errors import ConfigError, listing
from lorica.train.data.columns import by_lower_case, find_texts, is_text, needs_column
from lorica.train.data.forms.messages import is_messages
from lorica.train.data.forms.templates import read_template, template_of
from lorica.train.data.rows import parsed_cell
from lorica.train.settings import DataConfig

FORMS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("context", "completion"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
"""Columns of a prompt and of what follows it; the first pair found wins."""

SECOND = ("input", "context", "passage")
"""Columns of a second part of the prompt, beside ``instruction`` or ``question``."""

SYSTEMS = ("system", "system_prompt")

TOOLS = ("tools", "functions")

CHATS = ("messages", "conversations", "conversation")

_RAW = ("text", "content", "document", "body", "article")
"""Columns of raw text, whatever texts stand beside them."""


def find_form(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the columns that a language model learns from, as far as it names none.

    Raises:
        ConfigError: no form is known that has these columns, or one that another task learns from.
    """
    if data.template is not None:
        return find_templated(rows, data)
    if data.text is None:
        if found := find_prompt(rows, data):
            return found
        text = _chat_column(rows)
        if text is None:
            text, _ = find_texts(rows, None, None)
            check_raw(rows, text)
        data = replace(data, text=text)
    if data.label or holds_messages(rows, str(data.text)):
        return add_parts(rows, data)
    goes_on = by_lower_case(rows).get("continues")
    return replace(data, continues=goes_on) if data.continues is None and goes_on else data


def _chat_column(rows: Dataset) -> str | None:
    """The column of conversations: by its name, or else the only one that holds messages."""
    columns = by_lower_case(rows)
    if named := next((columns[name] for name in CHATS if name in columns), None):
        return named
    first = rows[0] if len(rows) else {}
    found = [name for name, value in first.items() if is_messages(value)]
    return found[0] if len(found) == 1 else None


def find_templated(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the template's own text, and the first of its columns as that of a lone text.

    Raises:
        FileError: the template's file cannot be read.
        ConfigError: it is no template, or it names a column that rows lack.
    """
    source = read_template(str(data.template))
    template = template_of(source, data.label)
    for name in template.columns if template.strict else []:
        needs_column(rows, name, "the training rows")
    read = [name for name in template.columns if name in rows.column_names and name != data.label]
    if not read:
        raise ConfigError(
            f"data.template reads no column of the training rows, which are: {listing(rows.column_names)}"
        )
    return replace(data, template=source, text=data.text or read[0])


def find_prompt(
    rows: Dataset, data: DataConfig, forms: Sequence[tuple[str, str]] = FORMS
) -> DataConfig | None:
    """The configuration with the columns of a known form, or None where rows have none of them.

    Raises:
        ConfigError: the rows are of a form that another task, or another library, learns from.
    """
    columns = by_lower_case(rows)
    _refuse_others(rows, columns)
    for prompt, completion in forms:
        if prompt in columns and completion in columns:
            found = replace(data, text=columns[prompt], label=columns[completion])
            kind = rows.features[columns[completion]]
            several = isinstance(kind, List) and not holds_messages(rows, columns[completion])
            if several and data.references not in columns:
                found = replace(found, references=columns[completion])
            return add_parts(rows, found)
    return None


def add_parts(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the other columns of a prompt, where rows have them and it names none."""
    columns = by_lower_case(rows)
    if data.system is None:
        data = replace(data, system=next((columns[name] for name in SYSTEMS if name in columns), None))
    taken = {data.text, data.label}
    if data.text_pair is None and str(data.text).lower() in ("instruction", "question"):
        second = next(
            (columns[name] for name in SECOND if name in columns and columns[name] not in taken), None
        )
        data = replace(data, text_pair=second)
    if data.tools is None and holds_messages(rows, str(data.text)):
        data = replace(data, tools=next((columns[name] for name in TOOLS if name in columns), None))
    return data


def check_raw(rows: Dataset, column: str) -> None:
    """Refuse to take a column for raw text, unasked, where others hold texts too and its name is not usual.

    Raises:
        ConfigError: it is such.
    """
    others = [name for name in rows.column_names if name != column and is_text(rows, name)]
    if others and column.lower() not in _RAW:
        raise ConfigError(
            f"cannot tell what is learned: texts stand in the columns {listing([column, *others])}. Raw "
            "text is "
            f"--data.text COLUMN; a prompt and what follows it --data.text COLUMN --data.label COLUMN"
        )


def holds_messages(rows: Dataset, column: str | None) -> bool:
    """Whether a column holds lists of messages, and not texts; in a csv file they are JSON."""
    if column is None or column not in rows.column_names:
        return False
    first = next((value for value in rows[column] if value not in (None, "", [])), None)
    if getattr(rows.features[column], "dtype", None) in ("string", "large_string"):
        parsed = parsed_cell(first)
        return isinstance(parsed, list) and (column.lower() in CHATS or is_messages(parsed))
    if first is None:
        return isinstance(rows.features[column], List)
    return isinstance(first, dict) or is_messages(first) or column.lower() in CHATS


def describe_form(rows: Dataset, data: DataConfig) -> str:
    """A line about the rows: the name of their form, the columns that are read, the text that is learned.

    Args:
        rows: some of the rows.
        data: their columns, resolved.
    """
    chats = data.messages or holds_messages(rows, data.text) or holds_messages(rows, data.label)
    if data.template is None and chats:
        return _conversation(rows, data)
    if data.template is not None:
        template = template_of(data.template, data.label)
        what = f"{data.label} is" if data.label else "what it marks is" if template.learns else "all is"
        return f"laid out by a template ({' + '.join(template.columns)}), of which {what} learned"
    read = " + ".join(name for name in (data.system, data.text, data.text_pair) if name is not None)
    if data.label is None and data.continues is not None:
        return f"running text ({read}), cut into pieces that follow on, of which every token is learned"
    if data.label is None:
        return f"raw text ({read}), of which every token is learned"
    return f"{_named(data)} ({read} → {data.label})"


def _conversation(rows: Dataset, data: DataConfig) -> str:
    read = " + ".join(name for name in (data.system, data.text, data.tools) if name is not None)
    if data.label is not None:
        return f"prompts and completions of messages ({read} → {data.label})"
    first = next((parsed_cell(value) for value in rows[str(data.text)] if value), None)
    message = first[0] if isinstance(first, list) and first else first
    shared = isinstance(message, dict) and message.get("from") is not None
    name = "ShareGPT's conversations" if shared else "messages"
    return f"{name} ({read}), of which what the assistant says is learned"


def _named(data: DataConfig) -> str:
    label, text = str(data.label).lower(), str(data.text).lower()
    if (text, label) == ("instruction", "output"):
        return "Alpaca's form"
    if (text, label) == ("instruction", "response"):
        return "Dolly's form"
    if (str(data.system).lower(), text, label) == ("system_prompt", "question", "response"):
        return "OpenOrca's form"
    return "questions and answers" if text == "question" else "prompts and completions"


def _refuse_others(rows: Dataset, columns: dict[str, str]) -> None:
    if "chosen" in columns and "rejected" in columns:
        raise ConfigError(
            "these rows are preference pairs (chosen, rejected): --task preference learns from them, and "
            "--task reward. To learn the chosen answers alone: --data.text prompt --data.label chosen, or "
            "--data.text chosen where they are conversations"
        )
    answers = columns.get("answers")
    if {"question", "context"} <= set(columns) and answers and "answer_start" in str(rows.features[answers]):
        raise ConfigError("these rows are SQuAD's (question, context, answers): --task question-answering")
    history = columns.get("history")
    if history and "instruction" in columns and any(rows[history]):
        raise ConfigError(
            f"column {history!r} holds earlier turns; give each conversation as one row, of a list of "
            "messages with "
            "role and content"
        )
