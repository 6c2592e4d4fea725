"""A pytest plugin: what PEFT's tests import from `peft` is what `lorica.peft` has under that name.

    tests/test_config.py   from peft import LoraConfig   ──▶  lorica.peft.LoraConfig
    transformers, TRL, PEFT itself   import peft         ──▶  PEFT, untouched

A name is looked for in `lorica.peft` at PEFT's own path; then anywhere in `lorica.peft`, for tests that
import it from where it is defined; else it is PEFT's own (other methods, internals). Functions that serve
every method take lorica's way for LoRA and PEFT's for the others.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import json
import pkgutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft as REAL
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lorica.peft
from lorica.layers import LoraParameters
from lorica.peft import LoraConfig, PeftModel
from lorica.peft.config import PeftConfig as OwnConfig

_SETTINGS: Any = importlib.import_module("lorica.peft.config")
_VERSION = _SETTINGS.__version__
CLIENTS = ("tests", "selection")
OF_ALL_METHODS = (
    "PeftType",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
)


class _AnyConfig(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, OwnConfig | REAL.PeftConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, OwnConfig | REAL.PeftConfig)


class PeftConfig(OwnConfig, metaclass=_AnyConfig):
    """lorica's for LoRA, PEFT's for every other method."""

    @classmethod
    def from_peft_type(cls, **fields: Any) -> Any:
        """A configuration of the method that is named."""
        kind = fields.get("peft_type")
        owner = OwnConfig if str(getattr(kind, "value", kind)) == "LORA" else REAL.PeftConfig
        return owner.from_peft_type(**fields)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **options: Any
    ) -> Any:
        """The configuration in a folder, by the method that it names."""
        where = pretrained_model_name_or_path
        path = Path(where, subfolder or "", "adapter_config.json")
        kind = json.loads(path.read_text()).get("peft_type", "LORA") if path.is_file() else "LORA"
        owner = OwnConfig if kind == "LORA" else REAL.PeftConfig
        return owner.from_pretrained(where, subfolder=subfolder, **options)


PeftConfig.__name__ = PeftConfig.__qualname__ = "PeftConfig"


def _by_config(own: Callable[..., Any], theirs: Callable[..., Any], position: int) -> Callable[..., Any]:
    @functools.wraps(own)
    def choose(*arguments: Any, **options: Any) -> Any:
        config = options["peft_config"] if "peft_config" in options else arguments[position]
        config = next(iter(config.values()), None) if isinstance(config, dict) else config
        foreign = isinstance(config, REAL.PeftConfig)
        return (theirs if foreign else own)(*arguments, **options)

    return choose


def _by_model(own: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def choose(model: Any, *arguments: Any, **options: Any) -> Any:
        foreign = isinstance(model, nn.Module) and (
            (isinstance(model, REAL.PeftModel) and not isinstance(model, PeftModel))
            or any(isinstance(module, BaseTunerLayer) for module in model.modules())
        )
        return (theirs if foreign else own)(model, *arguments, **options)

    return choose


CHOOSING: dict[str, Callable[[Any, Any], Callable[..., Any]]] = {
    "get_peft_model": lambda own, theirs: _by_config(own, theirs, 1),
    "inject_adapter_in_model": lambda own, theirs: _by_config(own, theirs, 0),
    **dict.fromkeys(
        (
            "get_peft_model_state_dict",
            "set_peft_model_state_dict",
            "get_layer_status",
            "get_model_status",
        ),
        _by_model,
    ),
}


def _modules(package: types.ModuleType) -> Iterator[types.ModuleType]:
    yield package
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(info.name)


class Names:
    """lorica's object for each of PEFT's, by where it stands and by what it is."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, str], Any] = {}
        self.instead_of: dict[int, Any] = {}
        chosen: dict[str, Any] = {"PeftConfig": PeftConfig}
        for module in _modules(lorica.peft):
            path = module.__name__.replace("lorica.peft", "peft", 1)
            try:
                theirs = importlib.import_module(path)
            except ModuleNotFoundError:
                continue
            for name, own in vars(module).items():
                real = getattr(theirs, name, None)
                if name.startswith("_") or name in OF_ALL_METHODS or not self._replaces(own, real):
                    continue
                if name in CHOOSING:
                    chosen.setdefault(name, CHOOSING[name](own, real))
                own = chosen.get(name, own)
                self.instead_of[id(real)] = self.at[path, name] = own
        configs = {**REAL.PEFT_TYPE_TO_CONFIG_MAPPING, REAL.PeftType.LORA: LoraConfig}
        models = {
            **REAL.MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
            **lorica.peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        }
        self.instead_of[id(REAL.PEFT_TYPE_TO_CONFIG_MAPPING)] = configs
        self.instead_of[id(REAL.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)] = models

    @staticmethod
    def _replaces(own: Any, real: Any) -> bool:
        if isinstance(own, types.ModuleType):
            return False
        if isinstance(own, dict):
            return isinstance(real, dict)
        return (inspect.isclass(real) or callable(real)) and str(getattr(own, "__module__", "")).startswith(
            "lorica"
        )


NAMES = Names()
# A fixture patches this method of PEFT's layer, so that there must be one to patch; nothing calls it.
LoraParameters.update_layer = REAL.tuners.lora.layer.ParamWrapper.update_layer  # type: ignore[attr-defined]
_MODULES: dict[str, Overlay] = {}


class Overlay(types.ModuleType):
    """A module of PEFT's as the tests see it; what they patch on it reaches PEFT's own."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        real = importlib.import_module(path)
        self.__dict__.update(
            _path=path,
            _real=real,
            _before={},
            __file__=getattr(real, "__file__", None),
            __path__=getattr(real, "__path__", []),
        )

    def __getattr__(self, name: str) -> Any:
        path, real = self.__dict__["_path"], self.__dict__["_real"]
        try:
            found = getattr(real, name)
        except AttributeError:
            try:
                return overlay(f"{path}.{name}")
            except ModuleNotFoundError:
                raise AttributeError(f"module {path!r} has no attribute {name!r}") from None
        if isinstance(found, types.ModuleType) and found.__name__.partition(".")[0] == "peft":
            return overlay(found.__name__)
        return NAMES.at.get((path, name), NAMES.instead_of.get(id(found), found))

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_before"].setdefault(name, getattr(self.__dict__["_real"], name, None))
        setattr(self.__dict__["_real"], name, value)
        if name == "__version__":
            _SETTINGS.__version__ = value

    def __delattr__(self, name: str) -> None:  # which is how monkeypatch undoes it
        if name in self.__dict__["_before"]:  # patched twice, it is undone twice
            setattr(self.__dict__["_real"], name, self.__dict__["_before"].pop(name))
        if name == "__version__":
            _SETTINGS.__version__ = _VERSION


def overlay(path: str) -> Overlay:
    """PEFT's module of that name, as the tests see it."""
    if path not in _MODULES:
        _MODULES[path] = Overlay(path)
    return _MODULES[path]


_import = builtins.__import__


def _importing(
    name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> types.ModuleType:
    found = _import(name, globals, locals, fromlist, level)
    asker = str((globals or {}).get("__name__") or "").partition(".")[0]
    if level == 0 and name.partition(".")[0] == "peft" and asker in CLIENTS:
        return overlay(name if fromlist else "peft")
    return found


builtins.__import__ = _importing
