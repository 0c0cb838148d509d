"""Quantization of a gradient and the Lion step with it, made of the kernels that there are."""

from ..reference.quantize_and_lion import composed
from .gradient import squared_norm
from .lion import step_rows_
from .quantize import quantize

quantize_and_lion_step_ = composed(quantize, squared_norm, step_rows_)
