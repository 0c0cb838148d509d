"""INT8 products that are quantized again, made of the kernels that there are."""

from ..reference.requantized_matmul import composed
from .int8_matmul import int8_matmul
from .quantize import quantize

requantized_matmul = composed(int8_matmul, quantize)
