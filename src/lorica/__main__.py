"""``python -m lorica``: the command line."""

from __future__ import annotations

import sys

from lorica.cli import main

sys.exit(main())
