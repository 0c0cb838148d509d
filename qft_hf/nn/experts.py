"""Experts of a layer as transformers holds them: all in one parameter, `[E, R, C]`.

Their modules are recognized by the names and shapes of their parameters and by the arguments of
forward, those of DBRX by their class. Tokens are sorted by expert; see `grouped`.
"""

from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .functional import once_differentiable
from .grouped import Groups, grouped_linear
from .modules import QuantizedModule


class _Reordered(torch.autograd.Function):
    """`x[index]` for `x` `[N, H]`, in which every row of `x` occurs equally often; `places` lists
    the positions of row 0 in the result, then those of row 1, and so on.

    PyTorch's own indexing sums gradients in a nondeterministic order on GPUs, and its scattering
    operators keep the rows for a backward pass that does not read them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.n_rows = x.shape[0]
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        of_rows = grad[places]
        if places.shape[0] > ctx.n_rows:
            of_rows = of_rows.view(ctx.n_rows, -1, grad.shape[-1]).sum(dim=1)
        return of_rows, None, None


class GroupedModule(QuantizedModule):
    """A module with weights of several experts, each of which gets its own tokens."""

    replaces_forward = True

    def multiply(self, x: Tensor, name: str, groups: Groups) -> Tensor:
        """Multiply `x`, sorted by expert, by the weight `name`; see `grouped.grouped_linear`."""
        weight = self.complete_weight(name)
        return grouped_linear(x, weight, groups, products=self.products, training=self.training)


class QFTExperts(GroupedModule):
    """Experts whose weights are `QFTWeight`; biases stay float.

    They have the form that `transformers.integrations.moe` describes, and replace its
    implementations: `gate_up_proj`, or `up_proj` without a gate, and `down_proj`, each with the
    matrices of all experts, and `_apply_gate` between them. Those of LongCat-Flash have the same
    names; a token sent to an expert number beyond those of `down_proj` is returned unchanged.
    """

    weight_names = ("gate_up_proj", "up_proj", "down_proj")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module has the parameters of this form, and its gate or identity experts."""
        return (hasattr(module, "_apply_gate") or hasattr(module, "identity_expert")) and (
            _are_3d(module, "gate_up_proj", "down_proj") or _are_3d(module, "up_proj", "down_proj")
        )

    @classmethod
    def holds_transposed(cls, module: Any) -> bool:
        """Whether the matrices are `[C, R]`, as in gpt-oss."""
        return bool(getattr(module, "is_transposed", False))

    down_proj: Any  # a QFTWeight; the attributes below are those of the plain class
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: int64 `[T, K]`: experts of each token. A number beyond the last expert
                adds nothing, or, with identity experts, the token itself.
            top_k_weights: `[T, K]`: their weights.

        Returns:
            `[T, H]` of the dtype of `hidden_states`.
        """
        n_choices = top_k_index.shape[-1]
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        # The only wait of the host for the device: which experts are expanded depends on `ends`.
        numbers = torch.arange(self.down_proj.shape[0], device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True).tolist()
        n = order.shape[0]
        all_places = torch.arange(n, device=order.device)
        places = torch.empty_like(order).index_copy_(0, order, all_places)

        x: Tensor = _Reordered.apply(hidden_states, order // n_choices, places)
        if (n_own := ends[-1]) == n:
            y = self._of_experts(x, chosen, ends)
        else:
            y = self._of_experts(x[:n_own], chosen[:n_own], ends)
            others = x[n_own:].to(y.dtype)
            is_identity = hasattr(self, "identity_expert")
            y = torch.cat((y, others if is_identity else torch.zeros_like(others)))
        y = _Reordered.apply(y, places, order).view(*top_k_index.shape, y.shape[-1])
        return (y * top_k_weights[..., None]).sum(dim=-2).to(hidden_states.dtype)

    def _of_experts(self, x: Tensor, chosen: Tensor, ends: list[int]) -> Tensor:
        """Return the outputs `[S, H]` of experts `chosen` for `x` `[S, H]`, sorted by expert."""
        up = "up_proj" if "up_proj" in self._parameters else "gate_up_proj"
        weight = self.complete_weight(up)
        without_tokens = weight.shape[0] - len(ends)  # `weight` may include identity experts
        groups = Groups(ends + [ends[-1]] * without_tokens, chosen.device)
        y = self._product(up, x, chosen, groups)
        if up == "up_proj":
            y = self.act_fn(y)
        elif hasattr(self, "_apply_gate"):
            y = self._apply_gate(y)
        else:
            gate, value = y.chunk(2, dim=-1)
            y = self.act_fn(gate) * value
        y = self._product("down_proj", y, chosen, groups)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _product(self, name: str, x: Tensor, chosen: Tensor, groups: Groups) -> Tensor:
        """Multiply `x`, sorted by expert, by the weight `name`, and add its bias if it has one."""
        y = self.multiply(x, name, groups)
        bias = self._parameters.get(f"{name}_bias")
        return y if bias is None else y + bias[chosen].to(y.dtype)


class QFTBatchedExperts(GroupedModule):
    """Experts that all get the same number of rows, one expert after the other, as in Llama 4.

    The row of a token is zeros at an expert that it is not sent to. These rows are left out:
    without biases their output is zero, and so is their gradient if a score of zero made them.
    """

    weight_names = ("gate_up_proj", "down_proj")

    down_proj: Any
    act_fn: Any

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module has these parameters and its forward only takes `hidden_states`."""
        return (
            _are_3d(module, *cls.weight_names)
            and hasattr(module, "act_fn")
            and not hasattr(module, "_apply_gate")
            and list(signature(module.forward).parameters) == ["hidden_states"]
        )

    @classmethod
    def holds_transposed(cls, module: Any) -> bool:
        """Whether the matrices are `[C, R]`: two outputs of the first per input of the second."""
        return bool(module.gate_up_proj.shape[2] == 2 * module.down_proj.shape[1])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[E * T, H]`, the rows of the first expert first, to the same shape."""
        n_experts = self.down_proj.shape[0]
        n_rows = len(hidden_states) // n_experts
        sent = hidden_states.any(dim=-1).nonzero().squeeze(1)
        last = n_rows * torch.arange(1, n_experts + 1, device=sent.device)
        groups = Groups(torch.searchsorted(sent, last).tolist(), sent.device)

        gate, up = self.multiply(hidden_states[sent], "gate_up_proj", groups).chunk(2, dim=-1)
        y = self.multiply(up * self.act_fn(gate), "down_proj", groups)
        return y.new_zeros(len(hidden_states), y.shape[-1]).index_copy_(0, sent, y)


class QFTParallelExperts(GroupedModule):
    """One product of all experts, called with tokens sorted by expert, as in JetMoe."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has one parameter `[E, R, C]` and its forward takes `expert_size`."""
        return (
            _are_3d(module, "weight")
            and hasattr(module, "num_experts")
            and list(signature(module.forward).parameters) == ["inputs", "expert_size"]
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """Map tokens `[S, C]`, sorted by expert, `expert_size` tokens of each, to `[S, R]`."""
        groups = Groups(list(accumulate(map(int, expert_size))), inputs.device)
        return self.multiply(inputs, "weight", groups)


class QFTStackedExperts(QuantizedModule):
    """Experts in three matrices, one expert below the other, as in DBRX.

    The class keeps its own forward, which reads the values of one expert at a time.
    """

    weight_names = ("w1", "v1", "w2")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the class of a module is `DbrxExpertGLU` or derived from it."""
        return "DbrxExpertGLU" in [base.__name__ for base in type(module).__mro__]


def _are_3d(module: nn.Module, *names: str) -> bool:
    own = [module._parameters.get(name) for name in names]
    return all(parameter is not None and parameter.ndim == 3 for parameter in own)
