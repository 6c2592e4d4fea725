"""Names out of files inside Markdown, YAML and a shell's line: as text, whatever characters they hold."""

from __future__ import annotations

import json
import re
import shlex

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&])")
_PLAIN_YAML = re.compile(r"(?:base_model:adapter:)?[A-Za-z][\w.]*[-/][\w./-]*", re.ASCII)
_MODEL = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


def as_line(text: str) -> str:
    """A text on one line: what breaks a line, or steers a terminal, becomes a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def as_markdown(text: str) -> str:
    """A text that Markdown shows as it is: no markup, HTML, table cell or heading of its own."""
    escaped = _SPECIAL.sub(r"\\\1", as_line(text))
    # Renderers know these without the backslash.
    return escaped.replace("\\&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\_", "_")


def as_yaml(text: str) -> str:
    """A text as a YAML scalar, quoted where it could be anything else."""
    return text if _PLAIN_YAML.fullmatch(text) else json.dumps(text)


def as_shell(text: str) -> str:
    """A text as one word of a shell's line."""
    return shlex.quote(text)


def is_model_name(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, and is no path."""
    return _MODEL.fullmatch(text) is not None
