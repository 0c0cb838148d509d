"""Checks of what a user sets: which values are valid, and which can be combined."""

from typing import Any

import torch

from ..config import check_choice

GRADIENTS = ("stack", "release")
CLIPPINGS = ("exact", "previous", "tensor")
ACCUMULATIONS = ("keep", "forbid")
NONFINITE = ("raise", "skip")
LARGEST = torch.finfo(torch.float32).max  # for kernels, larger numbers are infinite


def check_settings(
    gradient: str,
    nonfinite: str,
    accumulation: str,
    clipping: str | None,
    max_grad_norm: float | None,
) -> None:
    """Raise if a setting has an invalid value, or cannot be combined with another.

    Raises:
        ValueError: There is such a setting. The text names the choices.
    """
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("nonfinite", nonfinite, NONFINITE)
    check_choice("accumulation", accumulation, ACCUMULATIONS)
    check_choice("clipping", clipping, (None, *CLIPPINGS))
    if gradient == "stack":
        if clipping is not None or max_grad_norm is not None:
            raise ValueError(
                "clipping and max_grad_norm of an optimizer are for gradient='release', got "
                f"clipping={clipping!r} and max_grad_norm={max_grad_norm}. Leave them out: with "
                "gradient='stack' clip between backward and step by "
                "torch.nn.utils.clip_grad_norm_, as a Trainer does by its own max_grad_norm."
            )
        return
    if nonfinite == "skip":
        raise ValueError(
            "nonfinite='skip' needs all gradients before the first update, which "
            "gradient='release' does not have. Use nonfinite='raise', or gradient='stack'."
        )
    try:
        is_norm = max_grad_norm is None or 0 < max_grad_norm < float("inf")
    except TypeError:
        is_norm = False
    if not is_norm:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm!r}.")
    if (clipping is None) != (max_grad_norm is None):
        raise ValueError(
            "gradient='release' updates weights during backward, before the global norm is known, "
            f"so max_grad_norm and clipping go together, got max_grad_norm={max_grad_norm} and "
            f"clipping={clipping!r}. Set both: clipping='exact' (a second backward pass finds the "
            "norm), 'previous' (the norm of the previous step) or 'tensor' (each gradient by its "
            "own norm); or neither: max_grad_norm=0 in TrainingArguments (None in the optimizer); "
            "or use gradient='stack', which clips exactly at no cost."
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise if an option that every group has is out of range.

    Raises:
        ValueError: An option is out of range. The text names it and its range.
    """
    for name in ("lr", "weight_decay"):
        try:
            if isinstance(group[name], bool | str):  # float() takes these too
                raise TypeError
            value = float(group[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be a number, got {group[name]!r}.") from error
        if not 0 <= value <= LARGEST:
            raise ValueError(
                f"{name} must be finite and not negative, got {value}. To ascend, set "
                "maximize=True."
            )
    seed = group["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}.")
    for name in ("maximize", "stochastic_rounding"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}.")


def check_betas(betas: tuple[float, float], usual: tuple[float, float]) -> None:
    """Raise unless both are in [0, 1).

    Raises:
        ValueError: One is not.
    """
    try:
        are_good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    except TypeError:
        are_good = False
    if not are_good:
        raise ValueError(
            f"betas must be two numbers in [0, 1), got {betas}. The usual ones are {usual}."
        )
