"""Experts of a layer as transformers holds them: all in one parameter, `[E, R, C]`."""

from typing import Any

import torch
from torch import Tensor, nn

from .grouped import Groups, grouped_linear
from .modules import QuantizedModule


class QFTExperts(QuantizedModule):
    """Experts whose weights are `QFTWeight`; biases stay float.

    They are of the form that `transformers.integrations.moe` describes, whose implementations this
    one takes the place of: `gate_up_proj`, or `up_proj` without a gate, and `down_proj`, each with
    the matrices of all experts, and `_apply_gate` between them. Tokens are sorted by expert; of an
    expert without tokens nothing is expanded.
    """

    weight_names = ("gate_up_proj", "up_proj", "down_proj")
    replaces_forward = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module has the parameters of that form and its gate."""
        own = module._parameters
        weights = [own[name] for name in cls.weight_names if own.get(name) is not None]
        return (
            len(weights) == 2
            and all(weight is not None and weight.ndim == 3 for weight in weights)
            and "down_proj" in own
            and hasattr(module, "_apply_gate")
        )

    @classmethod
    def holds_transposed(cls, module: Any) -> bool:
        """Whether the matrices are `[C, R]`, as those of gpt-oss are."""
        return bool(getattr(module, "is_transposed", False))

    down_proj: Any  # a QFTWeight; what follows is from the plain class
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up what the experts of each token return, weighted.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: int64 `[T, K]`: experts of each token. A number that no expert has adds
                nothing.
            top_k_weights: `[T, K]`.

        Returns:
            `[T, H]` of the dtype of `hidden_states`.
        """
        n_experts, n_choices = self.down_proj.shape[0], top_k_index.shape[-1]
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        # The one time that the host waits for the device: what is expanded depends on it.
        numbers = torch.arange(n_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True).tolist()
        if ends[-1] < len(order):
            chosen, order = chosen[: ends[-1]], order[: ends[-1]]
        groups = Groups(ends, chosen.device)

        up = "gate_up_proj" if "gate_up_proj" in self._parameters else "up_proj"
        y = self._product(up, hidden_states[order // n_choices], chosen, groups)
        y = self._apply_gate(y) if up == "gate_up_proj" else self.act_fn(y)
        y = self._product("down_proj", y, chosen, groups)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        result = y.new_zeros(top_k_index.numel(), y.shape[-1]).index_copy_(0, order, y)
        return result.view(*top_k_index.shape, -1).sum(dim=-2).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, chosen: Tensor, groups: Groups) -> Tensor:
        """`x`, sorted by expert, times a weight, and its bias if there is one."""
        y = grouped_linear(x, self.complete_weight(name), groups, training=self.training)
        bias = self._parameters.get(f"{name}_bias")
        return y if bias is None else y + bias[chosen].to(y.dtype)
