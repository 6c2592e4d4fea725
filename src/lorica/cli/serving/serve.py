"""``lorica serve``: answer requests over HTTP, for one base and many adapters."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lorica.cli.shared.parsing import Parser

SOURCE = (
    "folder that `lorica train`, `lorica demo` or `lorica merge` wrote; an adapter's folder; or a model, by "
    "folder or Hub name"
)


def add_engine(parser: Parser) -> None:
    """Give a parser the options that name the base and the adapters."""
    parser.add_argument("source", type=str, help=SOURCE)
    parser.add_argument(
        "--adapters", type=str | None, help="folder whose folders are adapters; it is watched"
    )
    parser.add_argument("--slots", type=int, default=32, help="adapters in a batch together")
    parser.add_argument("--max-rank", type=int, default=64, help="the largest rank that is served")
    parser.add_argument(
        "--dtype", type=str, default="auto", help="of a decoder's weights: auto is its files'"
    )
    parser.add_argument(
        "--context", type=int | None, help="tokens of prompt and answer (default: the model's)"
    )


def engine_of(parsed: Any) -> tuple[Any, Any]:
    """The source that was named, and its engine, not started yet."""
    from lorica.errors import ConfigError
    from lorica.serve.opening import look_at, open_engine

    for name in ("slots", "max_rank"):
        if parsed[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {parsed[name]}")
    source = look_at(parsed.source)
    folders = [] if parsed.adapters is None else [parsed.adapters]
    wait = parsed.get("max_wait")
    if wait is not None and not wait > 0:
        raise ConfigError(f"--max-wait must be above 0 seconds, not {wait:g}; leave it out for no limit")
    if parsed.get("train") is not None:
        if source.kind == "encoder":
            raise ConfigError(f"{source.model} reads texts and writes none; --train is for models that write")
        published = Path(parsed.train) / "adapters"
        published.mkdir(parents=True, exist_ok=True)
        folders.append(str(published))
    options = {name: parsed[name] for name in ("slots", "max_rank", "dtype", "context")}
    return source, open_engine(source, folders, **options, wait=wait)


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "serve",
        description="Answer requests over HTTP, with OpenAI's and vLLM's endpoints and a page at /. A model "
        "that writes answers /v1/completions and /v1/chat/completions; one that reads /classify, "
        "/v1/embeddings and /score. A request's `model` names the adapter.",
    )
    add_engine(result)
    result.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on")
    result.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    result.add_argument(
        "--name", type=str | None, help="what the base is called (default: its folder or Hub name)"
    )
    result.add_argument("--api-key-file", type=str | None, help="file of keys, one a line; see the guide")
    result.add_argument("--anonymous", action="store_true", help="let other machines ask without a key")
    result.add_argument(
        "--allow-load", action="store_true", help="let adapters be loaded and unloaded over HTTP"
    )
    result.add_argument(
        "--train",
        type=str | None,
        help="folder for training as a service: the protocol of the tinker SDK at /api/v1, for a model that "
        "writes; what clients publish is served too",
    )
    result.add_argument(
        "--train-keys", type=str | None, help="file of the keys of those who train, and their limits"
    )
    result.add_argument(
        "--engines",
        type=int | None,
        help="with --train: passes over the base at once (default: 2 on a CPU of two cores or more, else 1); "
        "torch's threads are divided among them",
    )
    result.add_argument(
        "--max-wait",
        type=float | None,
        help="seconds that a request may wait for its turn; then it is answered with 429 (default: no limit)",
    )
    result.add_argument(
        "--base-template",
        action="store_true",
        help="lay conversations out by the base's chat template alone, whatever adapters bring",
    )
    result.add_argument("--drain", type=float, default=300.0, help="seconds to finish in when told to stop")
    return result


def run(argv: list[str]) -> int:
    """Serve until told to stop."""
    parsed: Any = parser().parse_args(argv)

    from lorica.errors import require

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")

    from lorica.serve.http import Keys, Served, Settings
    from lorica.serve.http.running import check_open, listen, log_to_stderr
    from lorica.serve.http.running import run as serve

    keys = Keys() if parsed.api_key_file is None else Keys.read(parsed.api_key_file)
    check_open(parsed.host, keys, anonymous=parsed.anonymous)
    tenants = _tenants(parsed)
    with listen(parsed.host, parsed.port) as taken, contextlib.ExitStack() as stack:
        log_to_stderr()
        source, engine = engine_of(parsed)
        settings = Settings(allow_load=parsed.allow_load)
        here = Served(
            parsed.name or source.model, engine, settings, keys, source.default, not parsed.base_template
        )
        beside = _training(parsed, engine, here.model, tenants, stack)
        host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        address = f"http://{host}:{taken.getsockname()[1]}"

        def told() -> None:
            print(f"serving {here.model} at {address}: a page at /, OpenAI's endpoints at /v1", flush=True)

        serve(here, taken, drain=parsed.drain, started=told, beside=beside)
    return 0


def _tenants(parsed: Any) -> Any:
    """Those who may train; None where nobody does."""
    from lorica.errors import ConfigError, require

    if parsed.train is None:
        if parsed.train_keys is not None:
            raise ConfigError("--train-keys says who may train, and nobody does without --train FOLDER")
        if parsed.engines is not None:
            raise ConfigError("--engines are those that train, and nothing does without --train FOLDER")
        return None
    if parsed.engines is not None and parsed.engines < 1:
        raise ConfigError(f"--engines must be at least 1, not {parsed.engines}")
    for module in ("greenlet", "tinker"):
        require(module, extra="service")
    from lorica.serve.http import Keys
    from lorica.serve.http.running import check_open
    from lorica.service import Tenants

    if parsed.train_keys is not None:
        return Tenants.read(parsed.train_keys)
    try:
        check_open(parsed.host, Keys(), anonymous=parsed.anonymous)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--api-key-file", "--train-keys")) from None
    return Tenants()


def _training(parsed: Any, engine: Any, name: str, tenants: Any, stack: contextlib.ExitStack) -> Any:
    """The function that puts the training protocol beside the other endpoints."""
    if tenants is None:
        return lambda app: app
    from lorica.service import Base, Service
    from lorica.service.engine.several.engines import usual
    from lorica.service.http import beside

    base = Base.sharing(engine.model, name, engine.tokenizer)
    engines = usual(base.device) if parsed.engines is None else parsed.engines
    service = Service(base, parsed.train, tenants, engines=engines)
    stack.callback(service.close)
    return beside(service)
