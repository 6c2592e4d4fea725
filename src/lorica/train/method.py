"""What a run trains: its recipe's method, and the new head that its task needs."""

from __future__ import annotations

from lorica.config import AdapterConfig
from lorica.train.tasks import Task


def typed(config: AdapterConfig, task: Task) -> AdapterConfig:
    """A configuration that trains the task's new head too."""
    config = config if config.task_type else config.replace(task_type=task.task_type)
    if task.modules_to_save and config.modules_to_save is None:
        config = config.replace(modules_to_save=list(task.modules_to_save))
    return config
