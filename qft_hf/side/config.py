"""How wide a side network is and how hidden states enter it. Plain values: no tensors, no torch."""

from dataclasses import dataclass

DOWNSAMPLES = ("adapter", "linear", "mean", "max")


@dataclass(frozen=True, kw_only=True)
class QSTConfig:
    """The side network of quantized side tuning (Zhang et al. 2024, arXiv 2401.07159, section 3).

    Args:
        r: The base is this many times as wide as the side network. It has to divide the base's
            hidden size; heads and intermediate width are divided likewise, and are 1 at least.
        downsample: How a hidden state of the base gets the side network's width. `"adapter"`: a
            low-rank product, SiLU, a second product and a layer norm. `"linear"`: one product.
            Both learn from the hidden states, and so one of each layer is kept for backward; with
            checkpointing none, and the base runs a second time instead. `"mean"` and `"max"`: of
            each `r` neighbouring values, which learns and keeps nothing.
        rank: Width between the two products of `"adapter"`; the others do not read it.

    Raises:
        TypeError: `r` or `rank` is no integer.
        ValueError: A value is out of its range; the text names the range.
    """

    r: int = 16
    downsample: str = "adapter"
    rank: int = 16

    def __post_init__(self) -> None:
        for name, least in (("r", 2), ("rank", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer of {least} or more, got {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be an integer of {least} or more, got {value}.")
        if self.downsample not in DOWNSAMPLES:
            wanted = ", ".join(map(repr, DOWNSAMPLES))
            raise ValueError(f"downsample must be one of {wanted}, got {self.downsample!r}.")
