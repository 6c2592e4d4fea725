"""Fields computed from other fields: ``2*r``, ``max(8, r)``."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from lorica.errors import ConfigError, nearest

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
    "int": int,
}


class Expression:
    """Arithmetic over other fields, and nothing else that Python can do.

    Args:
        text: numbers, fields, ``+ - * / // % **``, parentheses, and min, max, round, sqrt and int.

    Raises:
        ConfigError: the text holds anything else.
    """

    def __init__(self, text: str) -> None:
        """Parse the text, and check every part of it."""
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f"the expression {text!r} cannot be read: {error.msg}") from error
        self.names = tuple(dict.fromkeys(self._check(self._tree)))

    def value(self, fields: Mapping[str, Any]) -> Any:
        """Compute the value.

        Args:
            fields: values by name; ``method.r`` can be written ``r``.

        Raises:
            ConfigError: a field is missing, ambiguous or no number, or the result is undefined.
        """
        try:
            return self._evaluate(self._tree, fields)
        except (ArithmeticError, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the expression {self.text!r} has no value: {error}") from error

    def _check(self, node: ast.AST) -> list[str]:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return [_dotted(node, self.text)]
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return []
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return [*self._check(node.left), *self._check(node.right)]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self._check(node.operand)
        called = node.func if isinstance(node, ast.Call) and not node.keywords else None
        if isinstance(node, ast.Call) and isinstance(called, ast.Name) and called.id in _CALLS:
            return [name for argument in node.args for name in self._check(argument)]
        raise ConfigError(
            f"the expression {self.text!r} holds {ast.unparse(node)!r}; it may hold numbers, fields, "
            f"+ - * / // % ** and {', '.join(_CALLS)}"
        )

    def _evaluate(self, node: ast.AST, fields: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp):
            sides = (self._evaluate(side, fields) for side in (node.left, node.right))
            return _BINARY[type(node.op)](*sides)
        if isinstance(node, ast.UnaryOp):
            return -self._evaluate(node.operand, fields)
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return _CALLS[node.func.id](*(self._evaluate(argument, fields) for argument in node.args))
        name = _dotted(node, self.text)
        value = fields[field_named(name, fields, f"the expression {self.text!r}")]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"the expression {self.text!r} needs a number, and {name} is {value!r}")
        return value


def field_named(name: str, fields: Mapping[str, Any], where: str) -> str:
    """The full name of a field given by its last part; fields of `method` and `training` take precedence.

    Raises:
        ConfigError: no field has this name, or several have.
    """
    for known in (name, f"method.{name}", f"training.{name}"):
        if known in fields:
            return known
    ending = [field for field in fields if field.rpartition(".")[2] == name]
    if len(ending) > 1:
        raise ConfigError(f"{where} names {name!r}, which may be {' or '.join(ending)}; write it in full")
    if not ending:
        last = {field.rpartition(".")[2]: field for field in fields}
        close = nearest(name, fields) or nearest(name.rpartition(".")[2], last)
        raise ConfigError(f"{where} names no field of a recipe: {name!r}{close}")
    return ending[0]


def _dotted(node: ast.AST, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise ConfigError(f"the expression {text!r} holds {ast.unparse(node)!r}, which is no field")
