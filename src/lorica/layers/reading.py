"""Which parts of a module its own code reads past their forward.

    time_step = self.dt_proj.weight @ time_step      Mamba never calls dt_proj
    positions = self.position_embedding.weight       a table that is added as a whole

An update that acts in the part's forward alone would do nothing there. The code itself says so: this looks
for ``self.<part>.weight`` in the methods of the module's class.
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
    """What a module's code does with one of its parts.

    Args:
        read: it takes the part's weight.
        called: it calls the part, or hands it on.
    """

    read: bool
    called: bool


# What only asks about a weight: neither its values nor its gradient.
_ASKED = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "is_cuda", "numel"})
_ASKING = frozenset({"isinstance", "hasattr", "type", "id", "getattr"})
# Methods that make, tie, resize or load a model; what they do with weights is not computing.
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
# What every model of transformers inherits: loading, generating. It is long, and computes with no layer.
_COMMON = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)


def reading_of(module: nn.Module, parent: nn.Module | None) -> Reading:
    """What the code of `parent` does with its part `module`; as for any layer where that cannot be told.

    Args:
        module: the part.
        parent: the module that holds it.
    """
    if parent is None or type(parent).__module__.startswith("torch.nn."):
        return _CALLED
    # An adapted parent is looked at as what it was.
    found = _readings(getattr(parent, "base_class", type(parent)))
    if not found:
        return _CALLED
    names = [name for name, child in parent._modules.items() if child is module]
    return next((found[name] for name in names if name in found), _CALLED)


_CALLED = Reading(read=False, called=True)


@functools.cache
def _readings(cls: type[nn.Module]) -> Mapping[str, Reading]:
    """Part → what the class does with it, for the parts whose weights it reads."""
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
    """The names that a function looks up, those within its lambdas and comprehensions included."""
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
    """The parts of self that are called, or handed on."""
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
    """Every node with the one around it."""
    ahead: list[tuple[ast.AST, ast.AST | None]] = [(tree, None)]
    while ahead:
        node, outer = ahead.pop()
        yield node, outer
        ahead += [(child, node) for child in ast.iter_child_nodes(node)]
