"""Factors whose values accelerate keeps elsewhere."""

from __future__ import annotations

from typing import Any

from lorica.layers.swapped import Factor


class OffloadedFactor(Factor):
    """A factor whose values accelerate keeps elsewhere (`cpu_offload`, `disk_offload`); for inference.

    accelerate fetches values when a module is called, and a factor is only read.
    """

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, on the device that computes."""
        return self._brought("weight")

    @property
    def bias(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bias, likewise."""
        return self._brought("bias")

    def _brought(self, leaf: str) -> Any:
        held, hook = self._parameters[leaf], self.__dict__.get("_hf_hook")
        while hook is not None and getattr(hook, "weights_map", None) is None:  # several in one
            hook = next((h for h in getattr(hook, "hooks", ()) if getattr(h, "weights_map", None)), None)
        if held is None or not held.is_meta or hook is None:
            return held
        return hook.weights_map[leaf].to(hook.execution_device)


Factor.offloaded = OffloadedFactor
