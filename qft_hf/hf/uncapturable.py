"""Which runs cannot have their steps captured as CUDA graphs, and the alternatives."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..nn.experts import GroupedModule
from ..nn.kinds import kind_of
from .liger import WHOLE
from .optimizers import given_options


def refuse_uncapturable(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError for options and models that do not work with `cuda_graph=True`."""
    reasons = uncapturable(args, model)
    if args.device.type != "cuda":
        reasons.insert(0, f"it needs an NVIDIA GPU, and this run is on {args.device}")
    if reasons:
        raise ValueError(f"cuda_graph=True: {reasons[0]}; or leave cuda_graph off.")


def uncapturable(args: TrainingArguments, model: nn.Module) -> list[str]:
    """Return the reasons why a run cannot be captured on any device, each with an alternative."""
    reasons = []
    options = given_options(args)
    if options.get("gradient") == "release" and options.get("clipping") == "exact":
        reasons.append(
            "clipping='exact' runs each pass twice. Use clipping='previous', or "
            "gradient='stack', which clips exactly at no cost"
        )
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and checkpointing.get("preserve_rng_state", True):
        reasons.append(
            "gradient_checkpointing saves the state of random numbers on the host. In a model "
            'without dropout, {"use_reentrant": False, "preserve_rng_state": False} as '
            "gradient_checkpointing_kwargs, or as activation_checkpointing_kwargs if those are "
            "set, gives the same results without it"
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get(WHOLE):
        reasons.append(
            f"Liger's {WHOLE} counts the labels on the host. Leave it out of liger_kernel_config"
        )
    if args.torch_empty_cache_steps is not None:
        reasons.append("torch_empty_cache_steps frees memory in the pass. Leave it unset")
    if args.world_size > 1:
        reasons.append("several processes wait for each other in the pass. Start one process")
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if len(devices) > 1:
        reasons.append(f"a graph runs on one device, and the model is on {len(devices)}")
    experts = [
        name
        for name, module in model.named_modules()
        if issubclass(kind_of(module) or object, GroupedModule)
    ]
    if experts:
        reasons.append(f"the host has to see how many tokens each expert of {experts[0]} gets")
    return reasons
