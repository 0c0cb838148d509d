"""The linear layer of GPT-2, which holds its weight transposed."""

from typing import Any

from torch import Tensor, nn

from .functional import linear
from .modules import QuantizedModule


class QFTConv1D(QuantizedModule):
    """`Conv1D` of GPT-2, a linear layer whose weight is `[inputs, outputs]`; the bias is float."""

    replaces_forward = True
    weight: Any
    bias: Any

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the class of a module is `Conv1D` of transformers or derived from it."""
        names = [base.__name__ for base in type(module).__mro__]
        return "Conv1D" in names and hasattr(module, "nf")

    @classmethod
    def holds_transposed(cls, module: Any) -> bool:
        """Whether the weight of a module is `[inputs, outputs]`: always."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [..., inputs]` to `[..., outputs]`; see `functional.linear`."""
        weight = self.complete_weight()
        return linear(x, weight, self.bias, products=self.products, training=self.training)
