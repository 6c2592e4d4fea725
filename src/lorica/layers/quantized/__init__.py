"""Linear layers whose weight is packed into a few bits: how they are read, written and adapted."""

from __future__ import annotations

from lorica.layers.quantized.bitsandbytes import REPACKS as REPACKS
from lorica.layers.quantized.bitsandbytes import hold_layout as hold_layout
from lorica.layers.quantized.bitsandbytes import release_layout as release_layout
from lorica.layers.quantized.layer import LoraQuantized as LoraQuantized
from lorica.layers.quantized.quantizer import Quantizer as Quantizer
from lorica.layers.quantized.registry import dequantize as dequantize
from lorica.layers.quantized.registry import holding as holding
from lorica.layers.quantized.registry import is_unfinished as is_unfinished
from lorica.layers.quantized.registry import numel as numel
from lorica.layers.quantized.registry import quantizer_of as quantizer_of
from lorica.layers.quantized.registry import register as register
from lorica.layers.quantized.registry import requantize as requantize
from lorica.layers.quantized.registry import set_attribute as set_attribute
