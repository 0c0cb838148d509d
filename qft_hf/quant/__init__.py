"""INT8 tensors: weights that train and the gradients they receive."""

from .arrangement import Arrangement
from .gradient import Int8Gradient, TiledGradient, quantized
from .tensor import Int8Tensor
from .weight import QFTWeight

__all__ = ["Arrangement", "Int8Gradient", "Int8Tensor", "QFTWeight", "TiledGradient", "quantized"]
