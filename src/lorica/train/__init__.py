"""Training: recipes, tasks, a Trainer for adapted models, and the parameter groups for a loop of your own."""

from __future__ import annotations

from lorica.errors import require

for _module in ("transformers", "accelerate", "datasets", "jsonargparse", "rich", "sklearn", "yaml"):
    require(_module, extra="train")

from lorica.train.checkpoints import last_checkpoint as last_checkpoint  # noqa: E402
from lorica.train.fit import Fit as Fit  # noqa: E402
from lorica.train.fit import Interrupted as Interrupted  # noqa: E402
from lorica.train.fit import fit as fit  # noqa: E402
from lorica.train.optimizer import parameter_groups as parameter_groups  # noqa: E402
from lorica.train.recipe import DataConfig as DataConfig  # noqa: E402
from lorica.train.recipe import Recipe as Recipe  # noqa: E402
from lorica.train.recipe import TrainingConfig as TrainingConfig  # noqa: E402
from lorica.train.run import Prepared as Prepared  # noqa: E402
from lorica.train.run import Result as Result  # noqa: E402
from lorica.train.run import evaluate as evaluate  # noqa: E402
from lorica.train.run import open_run as open_run  # noqa: E402
from lorica.train.run import predict as predict  # noqa: E402
from lorica.train.run import prepare as prepare  # noqa: E402
from lorica.train.run import train as train  # noqa: E402
from lorica.train.tasks import Task as Task  # noqa: E402
from lorica.train.tasks import register as register_task  # noqa: E402
from lorica.train.trainer import LoraTrainerMixin as LoraTrainerMixin  # noqa: E402
from lorica.train.trainer import Trainer as Trainer  # noqa: E402
