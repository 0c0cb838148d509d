"""Which kinds of modules have quantized weights, and the names of these in a state dict."""

from typing import Any

from torch import nn

from ..quant import Arrangement
from .attention import QFTMultiheadAttention
from .conv1d import QFTConv1D
from .experts import QFTBatchedExperts, QFTExperts, QFTParallelExperts, QFTStackedExperts
from .modules import QFTEmbedding, QFTLinear, QuantizedModule
from .state import state_names

KINDS: tuple[type[QuantizedModule], ...] = (
    QFTLinear,
    QFTEmbedding,
    QFTMultiheadAttention,
    QFTConv1D,
    QFTExperts,
    QFTBatchedExperts,
    QFTParallelExperts,
    QFTStackedExperts,
)


def kind_of(module: nn.Module) -> type[QuantizedModule] | None:
    """Return the kind of a module, plain or quantized; None if it is of none."""
    if isinstance(module, QuantizedModule):
        return type(module).kind  # an attribute of the module may have this name
    return next((kind for kind in KINDS if kind.fits(module)), None)


def own_weights(module: nn.Module) -> dict[str, Any]:
    """Return the parameters of a plain or quantized module that are or will be `QFTWeight`."""
    kind = kind_of(module)
    return {} if kind is None else kind.weights_in(module)


def arrangement_of(module: nn.Module, name: str) -> Arrangement:
    """Return how the weight `name` of a module is stored as a matrix."""
    kind: Any = kind_of(module)
    return Arrangement(tuple(own_weights(module)[name].shape), kind.holds_transposed(module))


def weight_names() -> list[str]:
    """Return the names that quantized weights have in their modules."""
    return sorted({name for kind in KINDS for name in kind.weight_names})


def weight_of(key: str) -> str | None:
    """Return the full name of the weight that has `key` in a state dict as a field, or None."""
    prefix, dot, last = key.rpartition(".")
    for name in weight_names():
        if last in state_names(name).values():
            return prefix + dot + name
    return None
