"""`Recipe`: a whole run as a value. A YAML file holds one; the command line's flags are its fields.

A recipe travels, so its file is read with care: unknown fields are refused, code that it names as its task
runs only where the user trusts it, and no token or password is written down.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import yaml

from lorica.config import AdapterConfig, LoraConfig, as_config, read_config
from lorica.config.checks import check_types
from lorica.errors import ConfigError, FileError, listing, nearest
from lorica.reading import read_yaml
from lorica.train.settings import (
    QUANTIZATIONS,
    DataConfig,
    GenerationConfig,
    PostConfig,
    TrainingConfig,
    as_texts,
    expect,
)
from lorica.train.system import write_atomically

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def _default_method() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: what to learn, on which model, from which rows, by which method.

    Args:
        task: "sequence-classification", "multi-label-classification", "regression",
            "causal-lm", "seq2seq-lm", "token-classification", "question-answering", "image-classification",
            "preference", "reward", "grpo", "rloo", one registered by the user, or one in a file of theirs, as
            "path/to/file.py:Class".
        model: the pretrained model: a folder or a name on the Hugging Face Hub. The default is installed with
            lorica[demo] and needs no download.
        quantization: load the model packed by bitsandbytes: "nf4" or "fp4" (QLoRA's four bits a weight) or
            "int8". None loads it as it is. Needs lorica[quantized].
        data: where the rows come from.
        method: what trains.
        baseline: what trains instead of that: another of the paper's methods by its name and fields, such as
            ``{method: bitfit}``, or several to combine (LoRA is ``{method: lora, r: 8}`` there). None trains
            `method`.
        training: how it trains.
        init_from: folder or Hub name of an adapter whose weights training begins with, of the same method and
            targets. None begins as the method says.
        init_head: take that adapter's head too, where it has the same classes. Else the head starts anew.
        generation: settings by which a language task writes text, and the scores of it.
        post: the loss of preferences, and the rewards of reinforcement.
        output: folder for the adapter, the tokenizer, this recipe, run.json, checkpoints and
            TensorBoard's logs.
    """

    task: str = "sequence-classification"
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    quantization: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    method: LoraConfig = field(default_factory=_default_method)
    baseline: dict[str, Any] | list[dict[str, Any]] | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    init_from: str | None = None
    init_head: bool = False
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    post: PostConfig = field(default_factory=PostConfig)
    output: str = "runs/train"

    def __post_init__(self) -> None:
        """Check the values."""
        as_texts(self, "model", "init_from", "output")
        check_types(self)
        self.configuration()
        expect(
            self,
            "quantization",
            self.quantization in (None, *QUANTIZATIONS),
            f"None or one of {QUANTIZATIONS}",
        )
        expect(self, "init_head", self.init_from is not None or not self.init_head, "False without init_from")

    def configuration(self) -> AdapterConfig:
        """The method that trains: `baseline`, or else `method`.

        Raises:
            ConfigError: the baseline names no method, or a value that it cannot use.
        """
        if self.baseline is None:
            return self.method
        given = [self.baseline] if isinstance(self.baseline, Mapping) else self.baseline
        if not given or not all("method" in each for each in given):
            raise ConfigError(
                f"baseline must name a method, such as {{method: bitfit}}, not {self.baseline!r}"
            )
        return as_config([read_config(each) for each in given])

    def code(self) -> list[str]:
        """The Python of somebody's own that it names, which runs when it trains."""
        return code_in(self.task, self.post.rewards)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; ``replace(training={"seed": 1})`` reaches into a part."""
        for name, change in changes.items():
            if isinstance(change, Mapping) and dataclasses.is_dataclass(getattr(self, name)):
                changes[name] = dataclasses.replace(getattr(self, name), **change)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain value, as files hold them: tokens and passwords are left out."""
        return without_secrets(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out but tokens and passwords."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as a YAML file, and return its path."""
        path = Path(path)
        write_atomically(path, self.to_yaml())
        return path

    @classmethod
    def load(cls, path: str | Path, *, trust_task: bool = False) -> Recipe:
        """Read a recipe from a YAML file; fields it leaves out keep their defaults.

        Args:
            path: of the file.
            trust_task: take it also where its task or a reward is code, ``file.py:Class``, which runs when it
                is used.

        Raises:
            FileError: there is no such file, or it is not YAML.
            ConfigError: it has a field that does not exist, or a value of the wrong type; or its task or a
                reward is code that is not trusted.
        """
        return cls.from_dict(check_file(path), str(path), trust_task=trust_task)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "the recipe", *, trust_task: bool = False
    ) -> Recipe:
        """Make a recipe of plain values, as JSON and YAML hold them.

        Args:
            values: fields by name, those of a part in a mapping of their own.
            where: name of them in errors.
            trust_task: as in `load`.

        Raises:
            ConfigError: there is a field that does not exist, or a value of the wrong type; or the task is
                code that is not trusted.
        """
        check_fields(values, cls(), where)
        post = values.get("post")
        rewards = post.get("rewards") if isinstance(post, Mapping) else None
        check_trusted(code_in(values.get("task"), rewards), where, trust_task=trust_task)
        import jsonargparse

        parser = _parser()
        try:
            parsed = parser.parse_object(dict(values))
        except (jsonargparse.ArgumentError, OverflowError) as error:  # texts become numbers on the way
            raise ConfigError(f"{where}: {error}") from error
        return from_parsed(parser, parsed)


@functools.cache  # making one takes longer than all else that reading a recipe does
def _parser() -> ArgumentParser:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_recipe(parser)
    return parser


def add_recipe(parser: ArgumentParser) -> None:
    """Give a command-line parser a recipe's fields as options, and ``--config`` for a recipe file."""
    parser.add_argument(
        "--config", action="config", help="recipe to start from, a YAML file; options override it"
    )
    parser.add_class_arguments(Recipe)


def from_parsed(parser: ArgumentParser, parsed: Any) -> Recipe:
    """The recipe that parsed arguments stand for."""
    values = parser.instantiate(parsed)
    return Recipe(**{item.name: values[item.name] for item in dataclasses.fields(Recipe)})


def check_file(path: str | Path) -> Mapping[str, Any]:
    """Refuse a recipe file that is missing, is not YAML, or holds a field that does not exist.

    Returns:
        Its content.

    Raises:
        FileError: there is no such file, or it is not YAML.
        ConfigError: naming every unknown field, with the nearest known one.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".txt", ".parquet", ".xlsx"):
        raise FileError(f"{path} looks like rows, not a recipe; name rows with --data.train {path}")
    content = read_yaml(path, "the recipe")
    if not isinstance(content, Mapping):
        raise FileError(
            f"the recipe {path} must hold fields such as 'task:' and 'model:', not {type(content).__name__}"
        )
    check_fields(content, Recipe(), str(path))
    return content


def is_code(entry: object) -> bool:
    """Whether an entry of a recipe names something in somebody's file or module."""
    return isinstance(entry, str) and (":" in entry or entry.endswith(".py"))


def split_entry(entry: str) -> tuple[str, str]:
    """The file or module of an entry, and the name in it; the name may be left out behind a file."""
    if ".py:" in entry or not entry.endswith(".py"):
        place, _, name = entry.rpartition(":")
        return place, name
    return entry, ""


def import_from(place: str, what: str) -> ModuleType:
    """Import a file or a module, which runs it.

    Args:
        place: ``path/to/file.py`` or ``package.module``.
        what: name of the object that is taken from it, such as "the task", for errors.

    Raises:
        FileError: there is no such file or module, or it raised when imported.
    """
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise FileError(f"there is no file {place} to take {what} from")
        name = f"_lorica_{path.stem}_{abs(hash(path)):x}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"cannot import {what} from {place}: {type(error).__name__}: {error}") from error


def code_in(task: object, rewards: object) -> list[str]:
    """Those of a recipe's task and rewards that are somebody's Python, and no names or folders."""
    given = [task, *(rewards if isinstance(rewards, (list, tuple)) else [])]
    return [str(each) for each in given if is_code(each)]


def check_trusted(code: Sequence[str], where: str, *, trust_task: bool) -> None:
    """Refuse code that a file names, unless the user trusts it.

    Args:
        code: as the file names it.
        where: name of the file in errors.
        trust_task: the user's word.

    Raises:
        ConfigError: there is some, and it is not trusted.
    """
    if code and not trust_task:
        raise ConfigError(
            f"{where} names Python code as its task or reward, {', '.join(map(repr, code))}, which would run "
            "here. Read it, and if you trust it, say so with --trust_task (in Python: trust_task=True)"
        )


# Words of an argument's name, such as hub_token or WANDB_API_KEY.
_NAME = re.compile(
    r"(?:^|_)(?:token|tokens|password|passwd|secret|credentials?|api_?key|access_?key)$", re.IGNORECASE
)

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")

_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+@")


def without_secrets(value: Any) -> Any:
    """Plain values as a file may hold them: without what is secret by its name, or by its form.

    Args:
        value: of maps, lists and plain values, such as a recipe's fields.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items() if not is_secret(name, item)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return _IN_ADDRESS.sub("", _HUB_TOKEN.sub("", value)) if isinstance(value, str) else value


def is_secret(name: object, value: object) -> bool:
    """Whether a field's value, by its name, is one that opens somebody's account."""
    return isinstance(name, str) and isinstance(value, str) and _NAME.search(name) is not None


C = TypeVar("C")


def check_fields(values: Mapping[str, Any], default: Any, where: str) -> None:
    """Refuse plain values that do not fit the fields of a configuration.

    Args:
        values: fields by name, those of a part in a mapping of their own.
        default: an object of the class they belong to, such as a `Recipe`, with all its defaults.
        where: name of them in errors.

    Raises:
        ConfigError: naming every unknown field, with the nearest known one; a part that holds no fields; or
            every field that is null and must not be.
    """
    if unknown := list(_unknown(values, default)):
        raise ConfigError(f"{where}: unknown field {'; unknown field '.join(unknown)}")
    for name, value in values.items():
        if dataclasses.is_dataclass(getattr(default, name)) and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {name} must hold fields, not {value!r}")
    if empty := list(_empty(values, default)):
        raise ConfigError(
            f"{where}: {listing(empty)} must have a value, not null; leave it out for the default"
        )


def read_fields(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """A configuration of plain fields, from a file's values.

    Args:
        cls: a dataclass whose fields are numbers, texts, truth values, maps of numbers, or such dataclasses.
        values: fields by name.
        where: name of the file in errors.

    Raises:
        ConfigError: a field that does not exist, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    values = {
        name: read_fields(hints[name], value, f"{name} in {where}")
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(name))
        else value
        for name, value in values.items()
    }
    if unknown := [f"{str(name)!r}{nearest(str(name), names)}" for name in values if name not in names]:
        raise ConfigError(f"{where}: unknown field {'; unknown field '.join(unknown)}")
    if wrong := [
        f"{name} cannot be {value!r}" for name, value in values.items() if not _fits(value, hints[name])
    ]:
        raise ConfigError(f"{where}: {listing(wrong)}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            _fits(item, typing.get_args(hint)[1]) for item in value.values()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _unknown(content: Mapping[str, Any], known: Any, prefix: str = "") -> Iterator[str]:
    names = [item.name for item in dataclasses.fields(known)]
    for key, value in content.items():
        if key not in names:
            yield f"{prefix + str(key)!r}{nearest(str(key), names)}"
        elif dataclasses.is_dataclass(part := getattr(known, key)) and isinstance(value, Mapping):
            yield from _unknown(value, part, f"{prefix}{key}.")


def _empty(content: Mapping[str, Any], known: Any, prefix: str = "") -> Iterator[str]:
    types = {item.name: str(item.type) for item in dataclasses.fields(known)}
    for key, value in content.items():
        if value is None and "None" not in types[key]:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(part := getattr(known, key)):
            yield from _empty(value, part, f"{prefix}{key}.")
