"""Training: recipes, tasks, a Trainer for adapted models, and the parameter groups for a loop of your own.

    recipe, settings      a run as a value, and the parts of it
    data/, presets/       rows from files, memory and the Hub, with their columns and labels; public data sets
    tasks/, metrics/      what is learned: rows to features, the head, the loss; scores over a whole set
    prepared, adapt, run  rows encoded and model loaded, the adapter on it, the run from end to end
    trainer/              the Trainer, its loss, its arguments, its checkpoints; `fit`
    generation/           texts that a model writes, and their scores in evaluation
    post/                 preferences, rewards and reinforcement, carried by TRL
    distributed/, ray/    a run over several processes, and in workers of Ray Train
    record                ``run.json`` and the model card
    trained, forgetting   a trained model opened, scored and asked; its scores on other data
    merge, plan           adapter and base to one checkpoint; the cost beforehand
    embedded              a model and a data set that need no download
    console, system       lines on a screen; files, locks and processes

Names are imported when first used: transformers takes seconds to import, and a recipe or ``--help`` needs
none of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from lorica import names_of
from lorica.errors import require

for _module in ("transformers", "accelerate", "datasets", "jsonargparse", "rich", "sklearn", "yaml"):
    if importlib.util.find_spec(_module) is None:
        require(_module, extra="train")

if TYPE_CHECKING:
    from lorica.train.data.rows import RowError as RowError
    from lorica.train.generation.generate import generate as generate
    from lorica.train.post.native import teach_trl as teach_trl
    from lorica.train.prepared import Prepared as Prepared
    from lorica.train.prepared import prepare as prepare
    from lorica.train.recipe import Recipe as Recipe
    from lorica.train.record import Record as Record
    from lorica.train.run import Result as Result
    from lorica.train.run import train as train
    from lorica.train.settings import DataConfig as DataConfig
    from lorica.train.settings import GenerationConfig as GenerationConfig
    from lorica.train.settings import LaunchConfig as LaunchConfig
    from lorica.train.settings import TrainingConfig as TrainingConfig
    from lorica.train.tasks import Task as Task
    from lorica.train.tasks import register as register
    from lorica.train.trained import evaluate as evaluate
    from lorica.train.trained import open_run as open_run
    from lorica.train.trained import predict as predict
    from lorica.train.trainer.checkpoints import last_checkpoint as last_checkpoint
    from lorica.train.trainer.fit import Fit as Fit
    from lorica.train.trainer.fit import Interrupted as Interrupted
    from lorica.train.trainer.fit import fit as fit
    from lorica.train.trainer.mixin import LoraTrainerMixin as LoraTrainerMixin
    from lorica.train.trainer.optimizer import parameter_groups as parameter_groups
    from lorica.train.trainer.trainer import Trainer as Trainer

__all__ = [
    "DataConfig",
    "Fit",
    "GenerationConfig",
    "Interrupted",
    "LaunchConfig",
    "LoraTrainerMixin",
    "Prepared",
    "Recipe",
    "Record",
    "Result",
    "RowError",
    "Task",
    "Trainer",
    "TrainingConfig",
    "evaluate",
    "fit",
    "generate",
    "last_checkpoint",
    "open_run",
    "parameter_groups",
    "predict",
    "prepare",
    "register",
    "teach_trl",
    "train",
]

__getattr__ = names_of(
    __name__,
    {
        "data.rows": "RowError",
        "generation.generate": "generate",
        "post.native": "teach_trl",
        "prepared": "Prepared prepare",
        "recipe": "Recipe",
        "record": "Record",
        "run": "Result train",
        "settings": "DataConfig GenerationConfig LaunchConfig TrainingConfig",
        "tasks": "Task register",
        "trained": "evaluate open_run predict",
        "trainer.checkpoints": "last_checkpoint",
        "trainer.mixin": "LoraTrainerMixin",
        "trainer.fit": "Fit Interrupted fit",
        "trainer.optimizer": "parameter_groups",
        "trainer.trainer": "Trainer",
    },
)
