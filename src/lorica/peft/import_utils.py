"""Functions of `peft.import_utils`: whether other libraries are installed."""

from __future__ import annotations

import importlib.util


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _is_there("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed; all versions since 2023 have 4 bits."""
    return is_bnb_available()


def is_gptqmodel_available() -> bool:
    """Whether gptqmodel is installed."""
    return _is_there("gptqmodel")


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _is_there("optimum")


def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _is_there("aqlm")


def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _is_there("eetq")


def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _is_there("hqq")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _is_there("torchao")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_there("diffusers")


def is_xpu_available() -> bool:
    """Whether an Intel accelerator is available."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
