"""What these tests cannot do without."""

from __future__ import annotations

import importlib.util

# Without lorica[tune] none of these can be imported.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("greenlet") is None else []
