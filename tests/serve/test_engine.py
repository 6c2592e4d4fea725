"""What endpoints stand on: errors of one family, each with what its status needs."""

import subprocess
import sys

import pytest

from lorica import LoricaError
from lorica.serve import EngineDown, InvalidRequest, Overloaded, RefusedAdapter, UnknownAdapter


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidRequest("no", param="stop"), ValueError),
        (UnknownAdapter("no"), LookupError),
        (RefusedAdapter("no"), ValueError),
        (Overloaded("no", retry_after=2.5), RuntimeError),
        (EngineDown("no"), RuntimeError),
    ],
)
def test_errors_are_lorica_s_and_a_builtin_s(error: LoricaError, builtin: type[Exception]):
    assert isinstance(error, LoricaError)
    assert isinstance(error, builtin)
    assert str(error) == "no"
    assert {"param": "stop", "retry_after": 2.5}.items() >= {
        name: value for name, value in vars(error).items() if value is not None
    }.items()


def test_the_seam_imports_nothing_heavy():
    script = "import sys, lorica.serve.engine; print({'torch', 'transformers', 'fastapi'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
