"""Cross-entropy of a quantized output head, without all logits in memory.

Logits of 2,048 tokens over 128,000 words take 0.5 GB in bf16, and 2 GB more in FP32 with their
gradient: more than all activations of a checkpointed model. Here they exist for one chunk of words
at a time and are computed again in backward, which costs one more product with the head.

Shapes as in `functional`: N tokens, R words (rows of the head), C inputs.

Idea: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4
(arXiv:2411.09009); there in one GPU kernel and for float weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import Int8Gradient, QFTWeight
from .functional import once_differentiable, product_dtype, save_weight, saved_weight

IGNORED = -100  # label of a token without a loss, as in torch

# Logits that exist at a time, 64 MB in FP32.
LOGITS_ELEMENTS = 2**24


COMPUTES = (
    "this model computes with its logits in training, and with a chunked loss they do not "
    "exist. Leave chunked_loss off; outside training, call model.eval() or use torch.no_grad()."
)


class DeferredLogits:
    """The operands of the logits, which a head with a chunked loss returns in training.

    Only the loss accepts it. Any other computation with logits raises, so that a model that scales
    or caps its logits is not trained with the loss of the original ones.

    Args:
        hidden: Float `[..., C]`, input of the head.
        weight: `[R, C]`.
        bias: Float `[R]` or None.
    """

    def __init__(self, hidden: Tensor, weight: QFTWeight, bias: Tensor | None) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias

    def __getattr__(self, name: str) -> Any:
        """Refuse the attributes of tensors.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"{name!r}: {COMPUTES}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse every function of torch.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{getattr(function, '__name__', function)}: {COMPUTES}")

    def _refuse(self, other: Any) -> Any:
        raise TypeError(COMPUTES)

    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = _refuse


class _LinearCrossEntropy(torch.autograd.Function):
    """loss[N] = log sum exp(z) - z[label] with z[N, R] = x[N, C] W[R, C]^T + b[R]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QFTWeight, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        log_sum = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
        of_label = torch.zeros_like(log_sum)
        for rows in _word_ranges(x, weight):
            logits = _logits(x, weight, bias, rows)[1]
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(dim=1))
            place, inside = _places(labels, rows)
            of_label += torch.where(inside, logits.gather(1, place).squeeze(1), 0.0)
            del logits  # before the next ones are made
        # A label out of range makes a loss and gradients of NaN; see `linear_cross_entropy`.
        fits = (labels >= 0) & (labels < weight.shape[0])
        log_sum = torch.where(fits | (labels == IGNORED), log_sum, torch.nan)
        save_weight(ctx, weight)
        ctx.save_for_backward(x, bias, labels, log_sum)
        return torch.where(labels == IGNORED, 0.0, log_sum - of_label)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, Int8Gradient | None, Tensor | None, None]:
        x, bias, labels, log_sum = ctx.saved_tensors
        weight = saved_weight(ctx, uses_values=True)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_loss = torch.where(labels == IGNORED, 0.0, grad_loss)[:, None]
        grad_x = torch.zeros_like(x, dtype=torch.float32) if needs_x else None
        gradient = Int8Gradient.zeros(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        for rows in _word_ranges(x, weight):
            tile, logits = _logits(x, weight, bias, rows)
            place, inside = _places(labels, rows)
            grad_logits = logits.sub_(log_sum[:, None]).exp_()
            grad_logits.scatter_add_(1, place, -inside[:, None].float())
            grad = grad_logits.mul_(grad_loss).to(x.dtype)
            if grad_x is not None:
                grad_x += grad @ tile
            if gradient is not None:
                gradient.set_rows_(rows, grad.t() @ x)
            if grad_bias is not None:
                grad_bias[rows] = grad.sum(dim=0)
            del tile, logits, grad_logits, grad
        return None if grad_x is None else grad_x.to(x.dtype), gradient, grad_bias, None


def _word_ranges(x: Tensor, weight: QFTWeight) -> Iterator[slice]:
    """Yield the rows of the head of one chunk at a time."""
    return weight.row_tiles(at_most=words_at_a_time(len(x)))


def _logits(
    x: Tensor, weight: QFTWeight, bias: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return these rows of the weight in x's dtype, and FP32 logits `[N, rows]`."""
    tile = weight.dequantize_rows(rows, x.dtype)
    part = None if bias is None else bias[rows].to(x.dtype)
    return tile, F.linear(x, tile, part).float()


def words_at_a_time(n_tokens: int) -> int:
    """Return the number of words in one chunk of logits."""
    return max(1, LOGITS_ELEMENTS // max(1, n_tokens))


def _places(labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the column `[N, 1]` of each label in `rows`, 0 if not in it, and whether it is."""
    inside = (labels >= rows.start) & (labels < rows.stop)
    return torch.where(inside, labels - rows.start, 0)[:, None], inside


def linear_cross_entropy(
    x: Tensor, weight: QFTWeight, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of each token for logits `x W^T + b`, computed in chunks.

    Logits are computed in the dtype of `x` and converted to FP32, as in the loss of transformers.
    The gradient of the weight is an `Int8Gradient`.

    Args:
        x: Float `[N, C]`, of the weight's dtype; under autocast it is cast to the autocast dtype.
        weight: `[R, C]`.
        labels: int64 `[N]` in [0, R), or -100 for a token without a loss.
        bias: Float `[R]` or None.

    Returns:
        fp32 `[N]`; 0 where the label is -100.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
        ValueError: Shapes do not fit, or a label is out of range. On a GPU, where this check would
            make the host wait, such a label makes a loss of NaN, and gradients of NaN.
    """
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy needs x [N, C] and labels [N], got {tuple(x.shape)} and "
            f"{tuple(labels.shape)}. Flatten leading dimensions of both first."
        )
    if labels.device.type == "cpu":
        bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= weight.shape[0]))]
        if len(bad):
            raise ValueError(
                f"{len(bad)} labels are outside [0, {weight.shape[0]}), the first is "
                f"{int(bad[0])}. Labels are token ids, or {IGNORED} for tokens without a loss."
            )
    x = x.to(product_dtype(x, weight))
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels)
    return loss
