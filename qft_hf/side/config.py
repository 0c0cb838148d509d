"""The width of a side network and how hidden states enter it: plain values, without torch."""

from dataclasses import dataclass

from ..config import check_choice, check_type

DOWNSAMPLES = ("adapter", "linear", "mean", "max")


@dataclass(frozen=True, kw_only=True)
class QSTConfig:
    """The side network of quantized side tuning (Zhang et al. 2024, arXiv 2401.07159, section 3).

    Args:
        r: The base is this many times as wide as the side network. It must divide the base's
            hidden size; the number of heads and the intermediate width are divided by it too, and
            are at least 1.
        downsample: How a hidden state of the base is reduced to the side network's width.
            `"adapter"`: a low-rank product, SiLU, a second product and a layer norm. `"linear"`:
            one product. Both are trained, so one hidden state per layer is kept for backward; with
            checkpointing none is kept, and the base runs a second time instead. `"mean"` and
            `"max"` of each `r` neighboring values have no parameters and keep nothing.
        rank: Width between the two products of `"adapter"`; the others ignore it.

    Raises:
        TypeError: `r` or `rank` is not an integer.
        ValueError: A value is out of its range; the message names the range.
    """

    r: int = 16
    downsample: str = "adapter"
    rank: int = 16

    def __post_init__(self) -> None:
        for name, least in (("r", 2), ("rank", 1)):
            value, wanted = getattr(self, name), f"an integer of {least} or more"
            check_type(name, value, (int,), wanted)
            if value < least:
                raise ValueError(f"{name} must be {wanted}, got {value}.")
        check_choice("downsample", self.downsample, DOWNSAMPLES)
