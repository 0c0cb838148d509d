"""PyTorch's own attention, which reads its weights itself."""

from torch import nn

from .modules import QuantizedModule


class QFTMultiheadAttention(QuantizedModule, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose input projections are `QFTWeight`; its forward reads them.

    The output projection is a module of its own, whose weight is read here too.
    """

    plain_class = nn.MultiheadAttention
    weight_names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
