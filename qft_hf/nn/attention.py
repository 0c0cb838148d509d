"""PyTorch's own attention module, whose forward reads its weights directly."""

from torch import nn

from .modules import QuantizedModule


class QFTMultiheadAttention(QuantizedModule, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose input projections are `QFTWeight`; its forward reads them.

    The output projection is a separate module; this forward reads its weight too.
    """

    plain_class = nn.MultiheadAttention
    weight_names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
