"""Rows laid out by a template of the user's, for whatever form no name is known.

{columns}   Q: {question} A: {answer}                   the label's column is learned where it stands
Jinja       Q: {{ question }} A: {% generation %}{{ answer }}{% endgeneration %}   the marked text is learned

A template in which nothing is learned lays out a prompt, where a label follows it, and else a raw text. Jinja
runs in a sandbox: a recipe that somebody else wrote reads the row, and nothing else.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorica.errors import ConfigError, FileError
from lorica.train.data.rows import Unusable

_COLUMN = re.compile(r"\{([^{}]+)\}")

_FILES = (".jinja", ".jinja2", ".j2")

_BEGIN, _END = "\ue9a3", "\ue9a4"
"""Letters of Unicode's private part, around what is learned of a text that Jinja makes."""


@dataclass(frozen=True)
class Laid:
    """A row's text.

    Args:
        text: the whole of it.
        spans: first letter of each stretch that is learned, and the one after its last; in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def prompt(self) -> str:
        """The text before the last stretch that is learned, or all of it."""
        return self.text[: self.spans[-1][0]] if self.spans else self.text

    @property
    def answer(self) -> str:
        """The last stretch that is learned."""
        first, last = self.spans[-1] if self.spans else (0, 0)
        return self.text[first:last]


class _Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``, as chat templates have it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        """Keep the marks around the block's text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class RowTemplate:
    """A template, ready to lay out rows.

    Args:
        source: the template itself.
        label: column that is learned where it stands in a template of {columns}.

    Attributes:
        columns: columns that it reads, in the order of a template of {columns}, or sorted.
        learns: whether it says which part of the text is learned.
        strict: whether rows must have all its columns; Jinja may ask whether one is there.

    Raises:
        ConfigError: it is no template.
    """

    def __init__(self, source: str, label: str | None = None) -> None:
        """Read the template."""
        self.source, self.label = source, label
        self._jinja: jinja2.Template | None = None
        self.strict = not ("{{" in source or "{%" in source)
        if not self.strict:
            environment = _environment()
            try:
                tree = environment.parse(source)
                self._jinja = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ConfigError(f"data.template is no Jinja template: {error}") from error
            self.columns = sorted(jinja2.meta.find_undeclared_variables(tree))
            self.learns = any(
                isinstance(node, nodes.ExtensionAttribute) for node in tree.find_all(nodes.Expr)
            )
            return
        found = [*_COLUMN.split(source), None]  # text, column, text, ..., column, text
        self._parts = list(zip(found[::2], found[1::2], strict=True))
        self.columns = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        self.learns = label in self.columns
        if not self.columns:
            raise ConfigError(
                f"data.template names no column: {source!r:.60}; one stands in braces, such as {{question}}"
            )

    def lay_out(self, row: Mapping[str, Any]) -> Laid:
        """Lay out a row.

        Args:
            row: column → value; more than the template reads, maybe.

        Raises:
            Unusable: a value is missing, or the template refuses it.
        """
        return self._by_columns(row) if self._jinja is None else self._by_jinja(self._jinja, row)

    def _by_columns(self, row: Mapping[str, Any]) -> Laid:
        text, spans = "", []
        for before, name in self._parts:
            text += before or ""
            if name is None:
                continue
            value = row.get(name)
            if value is None or isinstance(value, (list, dict)):
                got = "nothing" if value is None else f"{value!r:.60}"
                raise Unusable(f"has {got} in column {name!r}, where a text is due")
            if name == self.label:
                spans.append((len(text), len(text) + len(str(value))))
            text += str(value)
        return Laid(text, tuple(spans))

    def _by_jinja(self, template: jinja2.Template, row: Mapping[str, Any]) -> Laid:
        if any(isinstance(value, str) and (_BEGIN in value or _END in value) for value in row.values()):
            raise Unusable("holds U+E9A3 or U+E9A4, by which templates mark what is learned")
        try:
            marked = template.render(**row)
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise Unusable(f"is refused by data.template: {error}") from error
        first, *others = marked.split(_BEGIN)
        text, spans = first, []
        for other in others:
            learned, _, rest = other.partition(_END)
            spans.append((len(text), len(text) + len(learned)))
            text += learned + rest
        return Laid(text, tuple(span for span in spans if span[0] < span[1]))


def read_template(value: str) -> str:
    """A template's own text, from `data.template`: the text, or a file of it.

    Raises:
        FileError: it names a file that cannot be read.
    """
    if not value.endswith(_FILES) or "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"cannot read the template {value}: {reason}") from error


@functools.lru_cache(maxsize=16)
def template_of(source: str, label: str | None = None) -> RowTemplate:
    """A template, read once."""
    return RowTemplate(source, label)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, extensions=[_Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment
