"""A list or a dictionary that is written in a cell of text, as JSON or as Python writes it."""

from __future__ import annotations

import ast
import io
import itertools
import json
import tokenize
from typing import Any


def structured(value: Any) -> Any:
    """What a cell such as ``["a", "b"]`` or ``{'text': ['a']}`` holds; any other value as it is.

    Python joins texts between which there is no comma; numpy's arrays are written so, and are left as texts.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        return value
    joined = any(one == two == tokenize.STRING for one, two in itertools.pairwise(kinds))
    return value if joined or not isinstance(found, (list, dict)) else found
