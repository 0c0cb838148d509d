"""How much of a model is or becomes INT8: reported or refused before the model changes."""

import copy
import logging
from typing import Any

from torch import nn

from ..nn import LISTED, ConversionPlan, Kept, QuantizedModule, conversion_plan, uses_our_forward
from ..nn.kinds import own_weights
from ..quant import QFTWeight
from .config import QFTConfig
from .wording import and_more

logger = logging.getLogger(__name__)

MOST_FLOAT = 0.1  # largest share of float parameters without a warning


def check_coverage(model: nn.Module, plan: ConversionPlan, config: QFTConfig) -> None:
    """Warn if more than a tenth of the parameters stays float; with `config.strict` raise.

    Modules listed in `modules_to_not_convert` are meant to stay float and are not counted.

    Raises:
        ValueError: Too much stays float with `config.strict`, or no weight at all is quantized.
    """
    if not plan.weights:
        raise ValueError(
            f"No weight of {type(model).__name__} can be INT8: none belongs to an nn.Linear or "
            "nn.Embedding, or a class derived from them, outside modules_to_not_convert. Train it "
            "with an ordinary optimizer."
        )
    own = [
        name
        for name, module in plan.modules.items()
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and not uses_our_forward(module)
    ]
    if config.matmul == "int8" and own:
        logger.warning(
            "matmul='int8' has no effect on %d modules of %s (%s, ...): their classes compute the "
            "product themselves, with the dequantized weight",
            len(own),
            type(model).__name__,
            own[0],
        )
    unasked = [kept for kept in plan.kept if kept.reason != LISTED]
    total = _count(plan.kept) + sum(weight.numel() for weight in plan.weights.values())
    share = _count(unasked) / total
    if share <= MOST_FLOAT:
        return
    text = (
        f"{share:.1%} of the parameters of {type(model).__name__} stay float, as do their "
        f"gradients and momentum: {'; '.join(_by_reason(unasked, total))}. List their modules in "
        "modules_to_not_convert if that is intended."
    )
    if config.strict:
        raise ValueError(f"{text} strict=True refuses it; the model is unchanged.")
    logger.warning(text)


def added_modules(model: nn.Module, config: QFTConfig) -> list[str]:
    """Return names of modules of an INT8 model that its format quantizes and that are not yet.

    A plain module that was added has float weights, or INT8 ones if they are tied to a weight that
    was there before. A module with a float weight is left by a conversion that was interrupted.
    """
    config = copy.copy(config)
    config.forget_absent(model)  # such as modules of a layer that was removed since
    plan = conversion_plan(model, config.modules_to_not_convert)
    return [
        name
        for name, module in plan.modules.items()
        if not isinstance(module, QuantizedModule)
        or not all(isinstance(weight, QFTWeight) for weight in own_weights(module).values())
    ]


def _by_reason(kept: list[Kept], total: int) -> list[str]:
    """Return share, names and reason in a line for each reason, the largest share first."""
    groups: dict[str, list[Kept]] = {}
    for parameter in kept:
        groups.setdefault(parameter.reason, []).append(parameter)
    return [
        f"{_count(group) / total:.1%} {_names(group)} ({reason})"
        for reason, group in sorted(groups.items(), key=lambda item: -_count(item[1]))
    ]


def _names(group: list[Kept]) -> str:
    by_size = sorted(group, key=lambda kept: -kept.parameter.numel())
    return and_more([kept.name for kept in by_size])


def _count(kept: Any) -> int:
    return sum(entry.parameter.numel() for entry in kept)
