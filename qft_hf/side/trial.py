"""A side network runs beside its base once before it is attached, forward and backward."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import QSTConfig
from .network import SideNetwork
from .stack import layer_stack

logger = logging.getLogger(__name__)

TOKENS = 8
# What was tried on the meta device: a plan attaches one side network to several forms of a base.
_tried_on_meta: set[tuple[type, str, QSTConfig]] = set()


def try_beside(network: SideNetwork, model: Any) -> None:
    """Run a side network and the base of a model on a few tokens, and leave both as they were.

    If the base does not run on token ids alone, as one that needs images, nothing is tried, and a
    warning says so. Nor is anything tried with a model on the meta device that is quantized, or
    that does not run there: attaching to the loaded model tries it.

    Args:
        network: The side network, attached to nothing, on the device of `model`.
        model: A transformers model without a side network.

    Raises:
        ValueError: They fail together and the base alone does not, or the network computes NaN or
            infinity from finite hidden states.
    """
    name, is_meta = type(model).__name__, network.gates.is_meta
    kind = type(model), model.config.to_json_string(), network.config
    if is_meta and (getattr(model, "is_quantized", False) or kind in _tried_on_meta):
        return
    base, tried = _without_storage(model, network.config) if is_meta else (model, network)
    try:
        with _as_in_training(tried, base):
            _train(tried, base)
        if is_meta:
            _tried_on_meta.add(kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        try:
            with _as_in_training(tried, base), torch.no_grad():
                _run(base, tried.gates.device)
        except Exception:  # noqa: BLE001 of any base
            # On meta nobody misses the trial: attaching to the loaded model tries again.
            level = logging.INFO if is_meta else logging.WARNING
            logger.log(level, "The side network of %s was not tried: %s", name, error)
            return
        raise ValueError(
            f"{name} cannot have a side network with r={network.config.r}. In a trial with "
            f"{TOKENS} tokens, {type(network.layers[0]).__name__} at width "
            f"{network.gates.shape[1]} ended in {type(error).__name__}: {str(error).rstrip('.')}. "
            "Choose another r or another model, or train all parameters (method full)."
        ) from error


def _without_storage(model: Any, config: QSTConfig) -> tuple[Any, SideNetwork]:
    """Return a copy of a model on the meta device that runs there, and a side network for it.

    There is no autocast, so both are FP32, and the usual kernels for experts take only BF16.
    """
    base = copy.deepcopy(model).float()
    base.set_experts_implementation("batched_mm")
    with torch.device("meta"):
        return base, SideNetwork(layer_stack(base)[1], base.config, config).float()


@contextmanager
def _as_in_training(network: SideNetwork, base: nn.Module) -> Iterator[None]:
    """Set the modes of training for the block; then restore all attributes and random numbers.

    Some modules note at their first pass how they will compute, such as those of bitsandbytes.
    """
    device = network.gates.device
    before = [(m, dict(vars(m))) for m in (*base.modules(), *network.modules())]
    network.frozen = tuple(base.children())
    try:
        network.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        # Never fewer attributes than before: an interrupt may come between any two lines.
        for module, attributes in before:
            vars(module).update(attributes)
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]


def _train(network: SideNetwork, base: Any) -> None:
    """Run the base and the network, and differentiate the output and the network's last state."""
    seen: dict[str, Tensor] = {}
    hooks = [
        network.downsamples[-1].register_forward_pre_hook(
            lambda _, args: seen.update(hidden=args[0])
        ),
        network.norm.register_forward_hook(lambda _, args, state: seen.update(state=state)),
        *network.follow(*layer_stack(base)),
    ]
    trained = {name: own for name, own in network.named_parameters() if own.requires_grad}
    try:
        for _ in range(2):  # a second time, because some layers keep a state of the pass before
            with torch.enable_grad():
                outputs = _run(base, network.gates.device)
            # The last product is zero at first, and so are the gradients of the outputs.
            total = torch.stack([value.float().sum() for value in (*outputs, seen["state"])]).sum()
            found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = dict(zip(trained, found, strict=True))
    if gradients["upsample"] is None:
        raise ValueError("the head does not read the last hidden state")
    if network.gates.is_meta or not _is_finite(seen["hidden"]):
        return
    if not all(_is_finite(value) for value in (seen["state"], *found) if value is not None):
        raise ArithmeticError("it computes NaN or infinity from finite hidden states")


def _run(base: Any, device: torch.device) -> list[Tensor]:
    """Return the tensors that the base computes for a few tokens, such as logits."""
    ids = torch.arange(TOKENS, device=device)[None] % base.config.get_text_config().vocab_size
    output = base(input_ids=ids)
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
