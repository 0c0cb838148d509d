"""Products with a quantized weight, and their gradients, as autograd functions.

Shapes: N tokens (all leading dimensions), R rows (outputs), C columns (inputs). Products that are
not INT8 expand the weight to float, a row tile at a time, and each tile of its gradient is
quantized or used as soon as it exists. Neither the weight nor its gradient exists whole in float,
unless the weight has a single tile. Few tokens, as in generation, are multiplied without expanding
the weight.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..quant import ALL_ROWS, Int8Gradient, QFTWeight, Tiles
from . import int8
from .products import FLOAT, Int8Products

is_compiling = torch.compiler.is_compiling

# Largest number of tokens that are multiplied without expanding the weight if no gradient is
# recorded: matrix units pad fewer tokens to this number. On CPUs (measured with one thread), 16
# tokens take between a ninth of the time of expanding in FP32 and all of it, and fewer tokens take
# less. On a CPU with native BF16 products, 4 tokens take as long as expanding, and 16 twice as
# long. On a GPU expanding moves five bytes per element, and this product one.
MAX_TOKENS = 16
MAX_TOKENS_BESIDE_NATIVE_BF16 = 4


def max_tokens(dtype: torch.dtype, device: torch.device) -> int:
    """Return the largest number of tokens multiplied, in `dtype`, without expanding the weight."""
    if dtype == torch.bfloat16 and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return MAX_TOKENS_BESIDE_NATIVE_BF16
    return MAX_TOKENS


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a backward pass that is itself recorded, with `create_graph=True`, raises.

    PyTorch's decorator of the same name raises only if the second derivative is taken by
    `backward()`; `torch.autograd.grad` leaves out the paths through the function without a word.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A backward pass with create_graph=True, as for second derivatives and gradient "
                "penalties, reached a quantized weight, whose gradients cannot be differentiated "
                "again. Leave create_graph out, or use a float model: "
                "qft_hf.dequantize_model_(model)."
            )
        return backward(ctx, *grads)

    return once


def _own(result: Tensor) -> Tensor:
    """Return a result, the only tensor that uses its memory, as a tensor that is not a view.

    Autograd refuses in-place changes of a view that a custom function returns.
    """
    if not result._is_view():
        return result
    owner: Tensor = torch.ops.aten._unsafe_view.default(result, result.shape)
    return owner


def save_weight(ctx: Any, weight: QFTWeight) -> None:
    """Keep a weight for backward.

    It is not a saved tensor, so it is not copied, moved or offloaded with activations. The version
    that autograd checks for saved tensors is checked in `saved_weight`.
    """
    ctx.weight = weight
    ctx.version = None if weight.is_inference() else weight._version


def saved_weight(ctx: Any, *, uses_values: bool) -> QFTWeight:
    """Return the weight that forward used, for backward.

    Raises:
        RuntimeError: It was dequantized, or backward uses its values, and they have changed.
    """
    weight: QFTWeight = ctx.weight
    if not isinstance(weight, QFTWeight):
        raise RuntimeError(
            "A weight was dequantized after the forward pass whose gradient is computed now. Run "
            "backward before dequantize_model_, or repeat the forward pass after it."
        )
    if uses_values and weight._version != ctx.version:
        raise RuntimeError(
            f"{weight!r} has changed since the forward pass whose gradient is computed now: an "
            "optimizer has updated it, or a state was loaded. Run backward of every forward pass "
            "before the step, or repeat the forward pass after it. With gradient='release', "
            "backward itself updates weights: add the losses and run backward once."
        )
    return weight


class _Linear(torch.autograd.Function):
    """y[..., R] = x[..., C] W[R, C]^T + b[R], with INT8 or float products as in `products`.

    `operand` is the quantized `x` if an INT8 product needs it. If the weight gradient is an INT8
    product, `operand` is kept for it, and `x` is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QFTWeight,
        bias: Tensor | None,
        products: Int8Products,
        operand: kernels.Input | None,
        dtype: torch.dtype,
    ) -> Tensor:
        save_weight(ctx, weight)
        ctx.products = products
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        y, kept = multiplied(
            x, weight, bias, products, operand, dtype, needs_weight=ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(*kept)
        return _own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight = saved_weight(ctx, uses_values=needs_x)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x, tiles = gradients(
            grad, ctx.saved_tensors, weight, ctx.products,
            needs_x=needs_x, needs_weight=needs_weight,
        )  # fmt: skip
        if grad_x is not None:
            if grad_x.dtype != ctx.x_dtype:
                grad_x = grad_x.to(ctx.x_dtype)
            grad_x = grad_x.view(ctx.x_shape)
        gradient = None if tiles is None else weight.gradient(tiles)
        return grad_x, gradient, grad.sum(dim=0) if needs_bias else None, None, None, None


def multiplied(
    x: Tensor,
    weight: QFTWeight,
    bias: Tensor | None,
    products: Int8Products,
    operand: kernels.Input | None,
    dtype: torch.dtype,
    *,
    needs_weight: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output `x W^T + b` and the tensors from which the weight gradient is computed.

    These are the fields of `operand`, or `x` if the weight gradient is not an INT8 product.
    """
    if not (products.forward and products.weight_gradient):
        x = x.to(dtype)
    kept: tuple[Tensor, ...] = ()
    if needs_weight:
        kept = operand if operand is not None and products.weight_gradient else (x,)
    if operand is not None and products.forward:
        return int8.forward(operand, x, weight, bias, dtype), kept
    return kernels.expanded_linear(x, weight.stored, bias=bias, own_dtype=weight.dtype), kept


def gradients(
    grad: Tensor,
    kept: tuple[Tensor, ...],
    weight: QFTWeight,
    products: Int8Products,
    *,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tiles | None]:
    """Return grad_x[N, C] and grad_W[R, C] for grad[N, R]; `kept` is from `multiplied`."""
    int8_x = needs_x and products.input_gradient
    operand = kernels.Input(*kept) if needs_weight and products.weight_gradient else None
    of_x = of_weight = None
    if int8_x or operand is not None:
        of_x, of_weight = int8.quantized_gradient(
            grad.contiguous(), weight, operand, for_x=int8_x, seed=products.seed
        )
    grad_x = tiles = None
    if of_x is not None:
        grad_x = int8.input_gradient(of_x, weight)
    elif needs_x:
        grad_x = kernels.expanded_input_gradient(grad, weight.stored, own_dtype=weight.dtype)
    if of_weight is not None and operand is not None:
        tiles = int8.weight_gradient(of_weight, operand)
    elif needs_weight:
        x = kept[0].reshape(-1, kept[0].shape[-1])
        tiles = Tiles(lambda rows: (grad if rows is ALL_ROWS else grad[:, rows]).t() @ x)
    return grad_x, tiles


class _Embedding(torch.autograd.Function):
    """y[..., C] = W[ids]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: QFTWeight, padding_idx: int | None) -> Tensor:
        save_weight(ctx, weight)
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        rows = ids.reshape(-1).contiguous()
        return _own(weight.dequantize_rows(rows).view(*ids.shape, weight.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Int8Gradient, None]:
        weight = saved_weight(ctx, uses_values=False)
        (ids,) = ctx.saved_tensors
        gradient = Int8Gradient.zeros(weight)
        # Only rows that were looked up have a gradient, so no float gradient of the table is made.
        kernels.embedding_gradient_(
            gradient.stored,
            ids.reshape(-1).contiguous(),
            grad_output.reshape(-1, weight.shape[1]).contiguous(),
            padding_idx=ctx.padding_idx,
        )
        return None, gradient, None


def linear(
    x: Tensor,
    weight: QFTWeight,
    bias: Tensor | None = None,
    *,
    products: Int8Products | None = None,
    training: bool = False,
) -> Tensor:
    """Return `x W^T + b` for a quantized weight, whose gradient is an `Int8Gradient`.

    Args:
        x: Float `[..., C]`, of the weight's dtype; under autocast the products are computed in the
            autocast dtype.
        weight: `[R, C]`, or transposed `[C, R]`. INT8 products need one scale per row, and outliers
            in the same columns of every row.
        bias: Float `[R]` or None.
        products: Which products are INT8; None: none. With fewer than `int8.MIN_TOKENS` tokens none
            is INT8.
        training: Whether this pass may be repeated by one that records gradients, as in
            checkpointed layers. Outside training, and if no gradients are recorded, few tokens
            (`max_tokens`) are multiplied without expanding the weight. This is faster
            and adds the same terms in another order.

    Returns:
        Float `[..., R]` of the dtype of `x`, or the autocast dtype.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    dtype, records = product_dtype(x, weight), training or torch.is_grad_enabled()
    if is_compiling():
        return _linear_in_graph(x, weight, bias, dtype, records, *(products or FLOAT))
    return _linear(x, weight, bias, dtype, records, products or FLOAT)


def _linear(
    x: Tensor,
    weight: QFTWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    records: bool,  # noqa: FBT001 of two callers
    products: Int8Products,
) -> Tensor:
    if not records and 0 < x.numel() <= max_tokens(dtype, x.device) * x.shape[-1]:
        few = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        y = kernels.dequantized_matmul(few, weight.stored, bias=bias)
        return _own(y.view(*x.shape[:-1], y.shape[-1]))
    if x.numel() < int8.MIN_TOKENS * x.shape[-1]:
        products = FLOAT
    operand = None
    if products.forward or (products.weight_gradient and torch.is_grad_enabled()):
        operand = int8.quantized_input(x, n_outliers=weight.outlier_values.shape[1])
    output: Tensor = _Linear.apply(x, weight, bias, products, operand, dtype)
    return output


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _linear_in_graph(
    x: Tensor,
    weight: QFTWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    records: bool,  # noqa: FBT001
    *products: Any,
) -> Tensor:
    """`_linear` as one call in Dynamo's graph, whose arguments must be tensors and numbers."""
    return _linear(x, weight, bias, dtype, records, Int8Products(*products))


def product_dtype(x: Tensor, weight: QFTWeight) -> torch.dtype:
    """Return the dtype in which `x` and `weight` are multiplied: that of autocast, or their own.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"linear needs an input of the weight's dtype {weight.dtype}, got {x.dtype}. Cast the "
            "input, load the model with another dtype, or run under torch.autocast."
        )
    return x.dtype


def embedding(ids: Tensor, weight: QFTWeight, padding_idx: int | None = None) -> Tensor:
    """Return rows `ids` of a quantized table, whose gradient is an `Int8Gradient`.

    Args:
        ids: int32 or int64 of any shape, in [0, rows).
        weight: `[rows, C]`.
        padding_idx: Number of a row that gets no gradient, or None.

    Returns:
        Float `[*ids.shape, C]` of the weight's dtype.

    Raises:
        IndexError: An id is not in [0, rows), on the CPU. On a GPU, where a check would have to
            wait for the device, the values of its row are NaN.
    """
    return _embedding(ids, weight, padding_idx)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _embedding(ids: Tensor, weight: QFTWeight, padding_idx: int | None) -> Tensor:
    output: Tensor = _Embedding.apply(ids, weight, padding_idx)
    return output
