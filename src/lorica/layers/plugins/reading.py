"""Find the parts of a module whose weights its own code reads without calling them.

    time_step = self.dt_proj.weight @ time_step      Mamba never calls dt_proj
    positions = self.position_embedding.weight       a table that is added as a whole

An update that acts only in the part's forward would do nothing there. This searches the methods of the
module's class for ``self.<part>.weight``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn


class Reading(NamedTuple):
    """The use of one of a module's parts by its code.

    Args:
        read: whether it takes the part's weight.
        called: whether it calls the part, or passes it on.
    """

    read: bool
    called: bool


# Attributes of a weight that depend on neither its values nor its gradient.
_ASKED = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "is_cuda", "numel"})
_ASKING = frozenset({"isinstance", "hasattr", "type", "id", "getattr"})
# Methods that make, tie, resize or load a model: they compute no output.
_NOT_COMPUTING = (
    "__init__",
    "_init_",
    "init_",
    "reset_",
    "tie_",
    "_tie_",
    "resize_",
    "_resize_",
    "get_",
    "set_",
)
# Classes that every model of transformers inherits, for loading and generating: long, and no layer in them.
_COMMON = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)


def reading_of(module: nn.Module, parent: nn.Module | None) -> Reading:
    """The use of `module` by the code of `parent`; "called" where the source is not available.

    Args:
        module: the part.
        parent: the module that holds it.
    """
    if parent is None or type(parent).__module__.startswith("torch.nn."):
        return _CALLED
    # The class that an adapted parent had before.
    found = _readings(getattr(parent, "base_class", type(parent)))
    if not found:
        return _CALLED
    names = [name for name, child in parent._modules.items() if child is module]
    return next((found[name] for name in names if name in found), _CALLED)


_CALLED = Reading(read=False, called=True)


@functools.cache
def _readings(cls: type[nn.Module]) -> Mapping[str, Reading]:
    """Part → how the class uses it, for the parts whose weights it reads."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if base.__module__.startswith(_COMMON):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else method
            if isinstance(function, FunctionType) and not name.startswith(_NOT_COMPUTING):
                methods.setdefault(name, function)
    reading = [function for function in methods.values() if "weight" in _names(function.__code__)]
    trees = list(filter(None, map(_tree, reading)))
    read = {name for tree in trees for name in _read(tree)}
    if not read:
        return {}
    rest = [f for f in methods.values() if "weight" not in _names(f.__code__) and read & _names(f.__code__)]
    called = {name for tree in [*trees, *filter(None, map(_tree, rest))] for name in _used(tree)}
    return {name: Reading(read=True, called=name in called) for name in read}


def _names(code: CodeType) -> set[str]:
    """The names that a function looks up, including its lambdas and comprehensions."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


def _tree(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time: there is no source to look at
        return None


def _read(tree: ast.AST) -> Iterator[str]:
    """The parts of self whose weight an expression takes."""
    for node, outer in _with_outer(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            part = _part(node.value)
            if part is not None and not _only_asks(node, outer):
                yield part


def _used(tree: ast.AST) -> Iterator[str]:
    """The parts of self that are called or passed on."""
    for node, outer in _with_outer(tree):
        part = _part(node) if isinstance(node, ast.Attribute) else None
        if part is not None and not isinstance(outer, ast.Attribute) and not _only_asks(node, outer):
            yield part


def _part(node: ast.AST) -> str | None:
    """The name in ``self.<name>``."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else None


def _only_asks(node: ast.AST, outer: ast.AST | None) -> bool:
    if isinstance(outer, ast.Attribute):
        return outer.attr in _ASKED
    if isinstance(outer, ast.Call) and node is not outer.func:
        return isinstance(outer.func, ast.Name) and outer.func.id in _ASKING
    return isinstance(outer, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in outer.ops)


def _with_outer(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Every node with its parent."""
    ahead: list[tuple[ast.AST, ast.AST | None]] = [(tree, None)]
    while ahead:
        node, outer = ahead.pop()
        yield node, outer
        ahead += [(child, node) for child in ast.iter_child_nodes(node)]
