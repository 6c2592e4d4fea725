"""Keeping the libraries below from talking over the run's own lines."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import datasets
import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from printing bars and notes of their own, and give them back their voice afterwards."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    data_bars = datasets.utils.is_progress_bar_enabled()
    others = {name: logging.getLogger(name) for name in ("accelerate", "bitsandbytes")}
    levels = {name: logger.level for name, logger in others.items()}
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in others.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Loaders pin memory where it helps; on a machine without a GPU torch remarks on it at every one.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        log.set_verbosity(level)
        for name, logger in others.items():
            logger.setLevel(levels[name])
        if bars:
            log.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
