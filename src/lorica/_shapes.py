"""Array types that carry their shape: ``Float[Tensor, "tokens d_in"]``.

The tests run the package with these checked at run time (jaxtyping and beartype). Users need neither: unless
jaxtyping is already imported when lorica is, the names below are placeholders that cost nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int, UInt8
else:

    class _Unchecked:
        def __class_getitem__(cls, item: Any) -> Any:
            return item[0]

    Float = Int = UInt8 = _Unchecked

__all__ = ["Float", "Int", "UInt8"]
