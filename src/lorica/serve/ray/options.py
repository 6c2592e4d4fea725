"""Arguments of `serve run lorica.serve.ray:app` and its YAML: the options of `lorica serve`, and Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorica.errors import ConfigError, nearest


class Options(BaseModel):
    """Options of a base that replicas of Ray Serve serve.

    Args:
        model: what `lorica serve` takes: a run, an adapter's folder, or a model by folder or Hub name. Every
            machine of the cluster must find it under this name.
        adapters: folder whose folders are adapters, on storage that all machines share; it is watched.
        slots: adapters in a batch together, per replica.
        max_rank: the largest rank that is served.
        dtype: of a decoder's weights; ``"auto"`` is its files'.
        context: tokens of prompt and answer; None for the model's.
        name: what the base is called; None for its folder or Hub name.
        api_key_file: file of keys, as for `lorica serve`.
        anonymous: whether other machines may ask without a key.
        max_wait: seconds that a request may wait for its turn at a replica; None for no limit.
        base_template: lay conversations out by the base's chat template alone.
        allow_load: whether adapters may be loaded and unloaded over HTTP.
        replicas: copies of the base, a process each.
        cpus: CPUs of a replica, and so its threads.
        gpus: GPUs of a replica.
        ongoing: requests that a replica has at a time; what is beyond waits.
        queue: requests that may wait; what is beyond gets 429.
        drain: seconds that a replica's requests have to finish in when it is told to stop.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    adapters: str | None = None
    slots: int = Field(default=32, ge=1)
    max_rank: int = Field(default=64, ge=1)
    dtype: str = "auto"
    context: int | None = Field(default=None, ge=1)
    name: str | None = None
    api_key_file: str | None = None
    anonymous: bool = False
    max_wait: float | None = Field(default=None, gt=0)
    base_template: bool = False
    allow_load: bool = False
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    ongoing: int = Field(default=64, ge=1)
    queue: int = Field(default=256, ge=1)
    drain: float = Field(default=60, ge=0)


def read(args: Mapping[str, Any]) -> Options:
    """The options that a user gave, as text on the command line or as values in YAML.

    Args:
        args: by name; dashes may stand for underscores, as in ``max-rank``.

    Raises:
        ConfigError: one is missing, unknown, or cannot have its value.
    """
    given = {str(name).replace("-", "_"): value for name, value in args.items()}
    known = Options.model_fields
    for name in given:
        if name not in known:
            raise ConfigError(
                f"there is no option {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
            )
    if "model" not in given:
        raise ConfigError(
            "model is missing: name a run, an adapter's folder or a model, as in model=runs/demo"
        )
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from None
