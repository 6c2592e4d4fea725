"""Ray for the length of a block: started here, or a cluster that is joined."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from lorica.errors import ConfigError, LoricaError


@contextlib.contextmanager
def connected(address: str | None, note: Callable[[str], object]) -> Iterator[None]:
    """Ray for the length of a block, started here or joined; a Ray that ran before keeps running.

    Args:
        address: of a cluster, ``"auto"`` for this machine's. None starts one.
        note: told what the cluster has.

    Raises:
        LoricaError: Ray cannot be started or reached.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                **options,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"Ray at {address!r} cannot be reached" if address else "Ray cannot be started here"
            raise LoricaError(f"{where}: {error}") from error
    elif address is not None:
        raise ConfigError(f"Ray runs in this process already, so {address!r} cannot be joined")
    try:
        resources = ray.cluster_resources()
        note(f"Ray: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs")
        yield
    finally:
        if ours:
            ray.shutdown()
