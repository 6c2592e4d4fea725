"""Adapters for other programs: what each would refuse of the files, and files in the form that it takes.

rules    what vLLM, SGLang and llama.cpp refuse, or compute otherwise, and how to mend it
plain    one rank and scale 1 for all layers: a form that every reader of PEFT's files understands alike
undoing  DoRA as plain LoRA of a higher rank, for those that refuse it
gguf     llama.cpp's file; mlx: mlx-lm's folder; kohya: a diffusion pipeline's file
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorica import names_of

if TYPE_CHECKING:
    from lorica.export.gguf import write_gguf as write_gguf
    from lorica.export.kohya import part_of as part_of
    from lorica.export.kohya import write_kohya as write_kohya
    from lorica.export.mlx import write_mlx as write_mlx
    from lorica.export.plain import even as even
    from lorica.export.rules import SERVERS as SERVERS
    from lorica.export.rules import Finding as Finding
    from lorica.export.rules import check_serve as check_serve
    from lorica.export.undoing import without_dora as without_dora

__getattr__ = names_of(
    __name__,
    {
        "gguf": "write_gguf",
        "kohya": "part_of write_kohya",
        "mlx": "write_mlx",
        "plain": "even",
        "rules": "SERVERS Finding check_serve",
        "undoing": "without_dora",
    },
)
