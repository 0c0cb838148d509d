"""Which kinds of modules have quantized weights, and what these are called in a state dict."""

from torch import nn

from ..quant import Arrangement
from .experts import QFTExperts
from .modules import QFTEmbedding, QFTLinear, QuantizedModule
from .state import state_names

KINDS: tuple[type[QuantizedModule], ...] = (QFTLinear, QFTEmbedding, QFTExperts)


def kind_of(module: nn.Module) -> type[QuantizedModule] | None:
    """The kind that a module, plain or quantized, is of; None: none."""
    if isinstance(module, QuantizedModule):
        return module.kind
    return next((kind for kind in KINDS if kind.fits(module)), None)


def arrangements(module: nn.Module) -> dict[str, Arrangement]:
    """How the weights of a module, plain or quantized, are matrices, by their names in it.

    They are the parameters that are, or will be, quantized.
    """
    kind = kind_of(module)
    if kind is None:
        return {}
    transposed = kind.holds_transposed(module)
    own = module._parameters
    return {
        name: Arrangement(tuple(weight.shape), transposed)
        for name in kind.weight_names
        if (weight := own.get(name)) is not None
    }


def weight_names() -> list[str]:
    """Names that quantized weights have in their modules."""
    return sorted({name for kind in KINDS for name in kind.weight_names})


def weight_of(key: str) -> str | None:
    """Full name of the weight that a name in a state dict is a field of; None if of none."""
    prefix, dot, last = key.rpartition(".")
    for name in weight_names():
        if last in state_names(name).values():
            return prefix + dot + name
    return None
