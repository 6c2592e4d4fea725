"""The settings of a search, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.config.checks import check_types
from lorica.errors import ConfigError, FileError, LoricaError, listing, nearest
from lorica.reading import read_object
from lorica.train.recipe import Recipe, read_fields
from lorica.train.settings import LaunchConfig
from lorica.tune.journal import JOURNAL, TRIALS
from lorica.tune.samplers import ALGORITHMS
from lorica.tune.space import Space

SEARCH = "search.json"
RAMP = "ramp.json"
ENGINES = ("auto", "population", "ray")
SCHEDULERS = ("asha", "median", "none")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a search.

    Args:
        trials: number of trials; fewer if the space has fewer.
        algorithm: "random", "tpe" (Optuna's), or "grid" (all combinations of choices).
        scheduler: which trials end early: "asha" (successive halving), "median" or "none".
        grace_period: evaluations before a trial can end early.
        reduction_factor: ASHA continues the best 1/`reduction_factor` of a rung.
        max_t: evaluations of a whole trial, for ASHA's rungs. None takes the recipe's number, or 100 where
            that depends on the number of rows.
        metric: metric on the validation rows that decides. None takes the recipe's or its task's.
        mode: "max" or "min". None decides by the metric's name.
        small: also search for few trained parameters, as a second objective of "tpe".
        time_budget: seconds after which training ends; unfinished trials can be resumed. None sets no limit.
        seed: seed of the draws; training has the recipe's seed.
        engine: "population" trains the trials together in this process; "ray" trains them in processes of
            Ray Tune, as a population per process where trials can share a base; "auto" takes the population
            if all trials can share a base and no cluster is named.
        slots: trials at once. Ray shares them among its processes; where a process trains one trial, no more
            run than there is room for. Trials of several processes on this machine run one at a time.
        resources: resources per process of Ray, such as ``{"cpu": 2, "gpu": 0.5}``. None is one CPU, and a
            GPU for each worker of a trial of several.
        address: address of a Ray cluster, "auto" for this machine's. None starts Ray here.
        retries: how often Ray replaces a process that died, or a trial's processes are started again.
        launch: several processes for each trial: `processes`, each with the recipe's batch size, and how they
            share the model. With ``engine="ray"`` in either, or an address, they are workers of Ray's; else
            they are this machine's.
    """

    trials: int = 20
    algorithm: str = "random"
    scheduler: str = "asha"
    grace_period: int = 1
    reduction_factor: float = 2.0
    max_t: int | None = None
    metric: str | None = None
    mode: str | None = None
    small: bool = False
    time_budget: float | None = None
    seed: int = 0
    engine: str = "auto"
    slots: int = 8
    resources: dict[str, float] | None = None
    address: str | None = None
    retries: int = 3
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is out of range.
        """
        check_types(self)
        for name, known in (
            ("algorithm", ALGORITHMS),
            ("scheduler", SCHEDULERS),
            ("engine", ENGINES),
            ("mode", ("max", "min", None)),
        ):
            value = getattr(self, name)
            if value not in known:
                hint = nearest(str(value), [each for each in known if each])
                raise ConfigError(f"{name} must be one of {known}, not {value!r}{hint}")
        for name, least in (("trials", 1), ("slots", 1), ("retries", 0), ("grace_period", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.max_t is not None and self.max_t < 1:
            raise ConfigError(f"max_t must be None or at least 1, not {self.max_t}")
        if self.time_budget is not None and not self.time_budget > 0:
            raise ConfigError(f"time_budget must be more than 0 seconds, not {self.time_budget}")
        if self.small and self.algorithm != "tpe":
            raise ConfigError(f"small is a second objective, which {self.algorithm!r} cannot use; take 'tpe'")
        self._check_launch()

    def _check_launch(self) -> None:
        launch = self.launch
        if launch.processes is None and launch.engine != LaunchConfig.engine:
            raise ConfigError(f"launch.engine {launch.engine!r} needs launch.processes, those of each trial")
        if launch.machines > 1:
            raise ConfigError(
                f"launch.machines must be 1 in a search, not {launch.machines}: what finds several machines "
                "for trials is Ray; give engine='ray' (--engine ray) and the cluster's address"
            )
        for name in ("address", "retries"):
            if getattr(launch, name) != getattr(LaunchConfig, name):
                raise ConfigError(
                    f"launch.{name} is the search's own {name} (--{name}); give that instead of "
                    f"--launch.{name} {getattr(launch, name)}"
                )
        if launch.processes is not None and self.engine == "population":
            raise ConfigError(
                f"engine 'population' trains trials in this process, and launch.processes asks for "
                f"{launch.processes} for each; leave one of the two out"
            )

        if self.where == "processes" and self.resources is not None:
            raise ConfigError(
                "resources are what Ray gives each worker, and these trials have processes of this machine; "
                "give engine='ray' (--engine ray) too, or leave them out"
            )

    @property
    def where(self) -> str | None:
        """The runner of trials, "ray", "processes" or "population"; None where that depends on the trials."""
        if self.launch.engine == "ray" or (self.launch.processes and self.address is not None):
            return "ray"
        if self.engine != "auto":
            return self.engine
        return None if self.launch.processes is None else "processes"


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """Settings of a search for a rank.

    Args:
        start: first rank.
        limit: largest rank.
        gain: improvement of the metric on the validation rows that justifies a doubling.
    """

    start: int = 1
    limit: int = 64
    gain: float = 0.005

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is out of range.
        """
        check_types(self)
        if not 1 <= self.start <= self.limit:
            raise ConfigError(
                f"the ramp must start from 1 and end at {self.limit}, not start at {self.start}"
            )
        if not self.gain >= 0:
            raise ConfigError(f"gain must be 0 or more, not {self.gain}")


def settings(recipe: Recipe, space: Space, config: SearchConfig) -> str:
    """The settings of a search as JSON."""
    dimensions = {name: {d.kind: d.given} for name, d in space.dimensions.items()}
    content = {
        "recipe": recipe.to_dict(),
        "space": dimensions,
        "search": dataclasses.asdict(config),
    }
    return json.dumps(content, indent=2, default=str) + "\n"


FREE = ("trials", "time_budget", "slots", "resources", "address", "retries", "engine", "launch.engine")
"""Settings that may differ in a resumed search: its extent, and where it runs."""


def changes(there: Path, now: str, free: Collection[str]) -> list[str]:
    """The names of settings that differ from those in a file.

    Args:
        there: the file.
        now: the new settings as JSON.
        free: settings that may differ, as ``part.name``.
    """
    before, after = (dict(_flat(content)) for content in (read_object(there), json.loads(now)))
    # A field that came after the file was written has the default there.
    unset = {f"recipe.{name}": value for name, value in _flat(Recipe().to_dict())}
    unset |= {f"search.{name}": value for name, value in _flat(dataclasses.asdict(SearchConfig()))}
    before = {name: unset[name] for name in after if name in unset and name not in before} | before
    return [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and not any(f"{name}.".startswith(f"{each}.") for each in free)
    ]


def in_order(recipe: Recipe, there: Path) -> Recipe:
    """The recipe with the order of rows that it leaves open: that of a search that goes on, or the task's.

    Args:
        recipe: of all trials.
        there: the file of the search's settings; it may not exist.
    """
    before = read_object(there).get("recipe") if there.is_file() else None
    training = before.get("training") if isinstance(before, dict) else None
    known = training.get("group_by_length") if isinstance(training, dict) else None
    if recipe.training.group_by_length is not None:
        return recipe
    from lorica.train import tasks  # the command's help is to be there at once

    together = known if isinstance(known, bool) else tasks.get(recipe.task).by_length(recipe.training)
    return recipe.replace(training={"group_by_length": together})


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_same(directory: Path, recipe: Recipe, space: Space, config: SearchConfig, *, resume: bool) -> None:
    """Refuse a folder that holds another search, or this one without `resume`.

    Raises:
        LoricaError: the folder holds a search, or trials of something else.
        ConfigError: the search in it has other settings; the message names them.
    """
    there = directory / SEARCH
    if not there.is_file():
        if any((directory / name).exists() for name in (RAMP, JOURNAL, TRIALS)):
            raise LoricaError(f"{directory} holds trials, but no {SEARCH}; choose another folder")
        return
    if not resume:
        raise LoricaError(
            f"{directory} holds a search already. Continue it with --resume, or choose another folder"
        )
    changed = changes(there, settings(recipe, space, config), [f"search.{name}" for name in FREE])
    if changed:
        raise ConfigError(
            f"the search in {directory} was started otherwise: {listing(changed)}. Resume it as it was with: "
            f"lorica tune --resume {shlex.quote(str(directory))}"
        )


def reopen(directory: str | Path, *, trust_task: bool = False) -> tuple[Recipe, Space, SearchConfig]:
    """Read the settings of the search in a folder.

    Args:
        directory: the folder.
        trust_task: as in `Recipe.load`.

    Raises:
        LoricaError: the folder holds no search.
    """
    path = Path(directory) / SEARCH
    if not path.is_file():
        raise LoricaError(f"{directory} holds no search: there is no {path}")
    content = read_object(path)
    for name in ("recipe", "space", "search"):
        if not isinstance(content.get(name), dict):
            raise FileError(f"{path} is damaged: its {name} is {content.get(name)!r}, not the fields of one")
    recipe = Recipe.from_dict(content["recipe"], str(path), trust_task=trust_task)
    return recipe, Space(content["space"]), read_fields(SearchConfig, content["search"], str(path))
