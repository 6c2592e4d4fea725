"""Adapters on the Hugging Face Hub, downloaded and uploaded; and bases, downloaded to be studied.

Only an adapter's own files, or a base's safetensors, are transferred: by `push`, or when a name is no local
folder. huggingface_hub transfers them; its cache, its token, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` apply.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lorica.adapter import Adapter
from lorica.checkpoint import peft
from lorica.checkpoint.embedded import resolve_model
from lorica.checkpoint.index import read_index
from lorica.checkpoint.peft import CARD_FILE, CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE, as_path
from lorica.errors import ConfigError, FileError, LoricaError, LoricaWarning, MissingExtra, require

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MODEL = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")  # the oldest models have no user
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BASE_WEIGHTS = "model.safetensors"
_TOKEN = "HF_TOKEN, `hf auth login` or token="


class _Sought(NamedTuple):
    """The words of messages for the files sought on the Hub."""

    noun: str
    files: str
    hint: str
    folder: str


_ADAPTER = _Sought(
    "an adapter",
    f"{CONFIG_FILE} and {WEIGHTS_FILE}",
    "; subfolder= says where in the repository they are",
    "A folder with the adapter's files needs no network: give its path, such as './adapter'",
)
_PUSHED = _ADAPTER._replace(folder="")
_BASE = _Sought(
    "a model in safetensors",
    f"config.json and {_BASE_WEIGHTS}",
    "",
    "A folder with the model's files needs no network: give its path, such as './model'",
)


def read(
    directory: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Read an adapter from a folder, or from the Hub.

    Args:
        directory: folder with `adapter_config.json` and `adapter_model.safetensors` (or an
            `adapter_model.bin`, which is read without unpickling anything but tensors); or the name of a
            repository on the Hub, ``"user/sentiment"``, if there is no such folder.
        revision: branch, tag or commit of the repository.
        subfolder: path of the adapter in the folder or repository.
        token: for a private or gated repository; None takes that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The adapter, on the CPU.

    Raises:
        FileError: a file is missing, truncated or damaged; or the Hub has no such adapter, or cannot be
            reached.
        ConfigError: the configuration is another method's, or asks for what lorica does not support.
        AdapterError: the tensors are not what the configuration says.
        MissingExtra: a repository is named, and huggingface_hub is not installed.
    """
    return peft.read(locate(directory, revision=revision, subfolder=subfolder, token=token))


def locate(name: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any) -> Path:
    """The folder of an adapter: a local one, else the Hub's repository of that name, downloaded.

    Args:
        name: folder, or name of a repository such as ``"user/sentiment"``. A folder wins; a `Path` is never
            the name of a repository.
        subfolder: path of the adapter in it.
        options: for `huggingface_hub.hf_hub_download`: revision, token, cache_dir, ... None counts as not
            given.

    Returns:
        The folder; for a repository, the one in the cache, with the adapter's files of one commit.

    Raises:
        FileError: the repository, its revision or the adapter in it is missing or cannot be downloaded. A
            missing local file is reported by the reader.
        MissingExtra: a repository is named, and huggingface_hub is not installed.
    """
    options = {key: value for key, value in options.items() if value is not None}
    here = as_path(name)
    if here.exists() or not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        if "revision" in options:
            warnings.warn(
                f"revision={options['revision']!r} says nothing about {name}, which is a folder here",
                LoricaWarning,
                stacklevel=3,
            )
        return here / (subfolder or "")
    with _explained(f"{name!r} is no folder here, and", name, subfolder, options.get("revision")) as hub:
        config = Path(hub.hf_hub_download(name, CONFIG_FILE, subfolder=subfolder, **options))
        # The weights of the same commit, whatever is pushed meanwhile.
        commit = config.parents[len(PurePosixPath(subfolder or "").parts)].name
        if _COMMIT.fullmatch(commit):
            options["revision"] = commit
        _fetch_weights(hub, name, subfolder, options)
    return config.parent


def locate_base(name: str | os.PathLike[str]) -> Path:
    """The folder or file of a model's weights: a local one, else the Hub's repository of that name.

    Args:
        name: folder, file of safetensors, or name of a repository such as ``"distilbert-base-uncased"``, or
            the embedded encoder's. A local path wins; a `Path` is never the name of a repository.

    Returns:
        The path as given; for a repository its folder in the cache, with `config.json` and the safetensors
        of one commit.

    Raises:
        FileError: the repository or its safetensors are missing or cannot be downloaded; or its index is
            damaged, or names a file outside it. A missing local file is reported by the reader.
        MissingExtra: a repository is named, and huggingface_hub is not installed.
    """
    here = as_path(resolve_model(name) if isinstance(name, str) else name)
    if here.exists() or not isinstance(name, str) or not _MODEL.fullmatch(name):
        return here
    with _explained(f"{name!r} is not here, and", name, None, None, _BASE) as hub:
        config = Path(hub.hf_hub_download(name, "config.json"))
        commit = config.parent.name
        options = {"revision": commit} if _COMMIT.fullmatch(commit) else {}
        try:
            hub.hf_hub_download(name, _BASE_WEIGHTS, **options)
        except hub.errors.EntryNotFoundError as error:
            if isinstance(error, hub.errors.LocalEntryNotFoundError):
                raise
            index = Path(hub.hf_hub_download(name, f"{_BASE_WEIGHTS}.index.json", **options))
            for shard in sorted(set(read_index(index)[1].values())):
                hub.hf_hub_download(name, shard, **options)
    return config.parent


def push(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload an adapter's files, and no others, in one commit; the repository is created if missing.

    Args:
        folder: the adapter's; it is read first, and a damaged one is not uploaded.
        repo_id: name of the repository, ``"user/sentiment"``.
        subfolder: path of the adapter in the repository; None for the top.
        revision: branch; created if missing. None is the main one.
        private: whether a new repository is private; None takes the account's default.
        token: of the account; None takes that of ``HF_TOKEN`` or ``hf auth login``.
        commit_message: title of the commit.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        FileError: the adapter is damaged, or the Hub cannot be reached or refuses.
        ConfigError: the repository exists, and is public where `private` is True, or private where False.
        MissingExtra: huggingface_hub is not installed.
    """
    folder = Path(folder)
    peft.read(folder)
    weights = WEIGHTS_FILE if (folder / WEIGHTS_FILE).is_file() else PICKLED_FILE
    files = [file for name in (CARD_FILE, weights, CONFIG_FILE) if (file := folder / name).is_file()]
    prefix = f"{subfolder}/" if subfolder else ""
    with _explained(f"{folder} was not pushed:", repo_id, None, revision, _PUSHED) as hub:
        api = hub.HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.model_info(repository).private is not private:
            visible = "public" if private else "private"
            raise ConfigError(
                f"{repository} is there already and is {visible}; private={private} is for a new repository. "
                "Change it in the repository's settings, or leave private out"
            )
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.create_commit(
            repository,
            [hub.CommitOperationAdd(f"{prefix}{file.name}", file) for file in files],
            revision=revision,
            commit_message=commit_message or "Upload adapter",
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url


def _fetch_weights(hub: Any, name: str, subfolder: str | None, options: dict[str, Any]) -> None:
    """Download the weights to the cache: safetensors, else the pickled form."""
    missing = []
    for file in (WEIGHTS_FILE, PICKLED_FILE):
        try:
            hub.hf_hub_download(name, file, subfolder=subfolder, **options)
            return
        except hub.errors.EntryNotFoundError as error:
            missing.append(error)
    # A file that could not be looked up is not known to be missing.
    raise next((e for e in missing if isinstance(e, hub.errors.LocalEntryNotFoundError)), missing[0])


@contextlib.contextmanager
def _explained(
    what: str, name: str, subfolder: str | None, revision: str | None, sought: _Sought = _ADAPTER
) -> Iterator[Any]:
    """Import huggingface_hub, and raise its errors as lorica's own."""
    try:
        errors = require("huggingface_hub.errors", extra="hub")
        hub = require("huggingface_hub", extra="hub")
    except MissingExtra as error:
        raise MissingExtra(f"{what} to reach the Hub takes more: {error}") from error
    place = f"{name}/{subfolder}" if subfolder else name
    try:
        yield hub
    except LoricaError:
        raise
    except errors.GatedRepoError as error:
        page = f"{hub.constants.ENDPOINT}/{name}"
        raise FileError(
            f"{what} on the Hub it is gated: ask for access at {page}, then log in with `hf auth login` or "
            "give token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileError(
            f"{what} the Hub has no repository {name!r}, or a private one that needs another token "
            f"({_TOKEN}). {sought.folder}".rstrip()
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{what} on the Hub {name} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileError(
            f"{what} {_unreachable(hub, error)}, and the cache does not hold it. {sought.folder}".rstrip()
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileError(
            f"{what} on the Hub {place} is not {sought.noun}: it should hold {sought.files}{sought.hint}"
        ) from error
    except errors.HfHubHTTPError as error:
        hint = f"; a token that may is needed ({_TOKEN})" if error.response.status_code in (401, 403) else ""
        raise FileError(f"{what} the Hub refused: {_first_line(error)}{hint}") from error
    except (OSError, ValueError, getattr(errors, "HTTPError", OSError)) as error:
        if isinstance(error, errors.HFValidationError):
            raise FileError(f"{what} {name!r} cannot name a repository: {_first_line(error)}") from error
        raise FileError(f"{what} {_unreachable(hub, error)}. {sought.folder}".rstrip()) from error


def _unreachable(hub: Any, error: BaseException) -> str:
    if hub.constants.is_offline_mode():
        return "the Hub is not asked, since HF_HUB_OFFLINE is set"
    return f"the Hub ({hub.constants.ENDPOINT}) cannot be reached: {_first_line(error.__cause__ or error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
