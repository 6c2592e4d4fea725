"""A base on Ray Serve: replicas on one machine or many, an adapter's requests together at one of them.

    serve run lorica.serve.ray:app model=runs/demo adapters=adapters replicas=2

options    what the command line and YAML take
ingress    reads a request's `model`, chooses a replica, passes its answer on
replica    the endpoints of `lorica.serve.http` over one engine
registry   what was loaded and unloaded over HTTP, for all replicas
"""

from __future__ import annotations

from typing import Any

from lorica.errors import require
from lorica.serve.ray.options import Options as Options
from lorica.serve.ray.options import read


def app(args: dict[str, Any]) -> Any:
    """The application that `serve run` and YAML build.

    Args:
        args: as `Options` names them.

    Returns:
        An application of Ray Serve, with the deployments ``Ingress``, ``Replica`` and ``Registry``.

    Raises:
        ConfigError: an option is missing, unknown, or cannot have its value.
        LoricaError: the model is not there, or none that is served.
        MissingExtra: Ray Serve is not installed.
    """
    serve = require("ray.serve", extra="ray")
    from lorica.serve.opening import look_at
    from lorica.serve.ray.ingress import ROUTER, Ingress
    from lorica.serve.ray.registry import Registry
    from lorica.serve.ray.replica import Replica

    options = read(args)
    look_at(options.model)  # Ray would try a replica that cannot start again and again
    registry = serve.deployment(
        name="Registry",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        health_check_period_s=5,
        logging_config={"enable_access_log": False},
    )(Registry).bind()
    replicas = serve.deployment(
        name="Replica",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queue,
        health_check_period_s=2,
        request_router_config=serve.config.RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=options.drain + 10,
    )(Replica).bind(options, registry)
    return serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        # Those that wait are held here, and counted at the replicas.
        max_ongoing_requests=100_000,
        health_check_period_s=5,
    )(Ingress).bind(options, replicas, registry)
