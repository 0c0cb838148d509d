"""INT8 tensors: weights that train and the gradients they receive."""

from .arrangement import Arrangement
from .gradient import Int8Gradient, TiledGradient, Tiles, quantized
from .hybrid import check_quantizable
from .reading import View
from .tensor import Int8Tensor
from .weight import ALL_ROWS, QFTWeight

__all__ = [
    "ALL_ROWS",
    "Arrangement",
    "Int8Gradient",
    "Int8Tensor",
    "QFTWeight",
    "TiledGradient",
    "Tiles",
    "View",
    "check_quantizable",
    "quantized",
]
