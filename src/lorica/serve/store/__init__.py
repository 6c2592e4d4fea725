"""The store of adapters: which there are, which are in memory, and who holds them.

    folder ──▶ listed ──read, fit──▶ resident ──copy──▶ mounted in a slot
                          away from the event loop       between two steps

folders   adapters listed, refused and read in folders that strangers may write to
store     names and contents, leases, eviction, the watched folders
"""

from __future__ import annotations

from lorica.serve.store.store import Content as Content
from lorica.serve.store.store import Lease as Lease
from lorica.serve.store.store import Store as Store
