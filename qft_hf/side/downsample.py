"""Modules that reduce a hidden state of the base to the width of the side network."""

from torch import Tensor, nn

from .config import QSTConfig


class Adapter(nn.Module):
    """`[..., width]` to `[..., side_width]` through `rank` values, with SiLU and a layer norm."""

    def __init__(self, width: int, side_width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, side_width, bias=False)
        self.norm = nn.LayerNorm(side_width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` `[..., width]` to `[..., side_width]`."""
        narrow: Tensor = self.norm(self.up(nn.functional.silu(self.down(hidden))))
        return narrow


class Pool(nn.Module):
    """`[..., width]` to `[..., width / r]`: the mean or maximum of `r` neighboring values."""

    def __init__(self, r: int, kind: str) -> None:
        super().__init__()
        self.r, self.kind = r, kind

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` `[..., width]` to `[..., width / r]`."""
        neighbours = hidden.unflatten(-1, (-1, self.r))
        return neighbours.mean(-1) if self.kind == "mean" else neighbours.amax(-1)

    def extra_repr(self) -> str:
        """Return the kind of pooling and `r`."""
        return f"{self.kind} of {self.r}"


def downsample(width: int, side_width: int, config: QSTConfig) -> nn.Module:
    """Return a new module from `[..., width]` to `[..., side_width]`, by `config.downsample`."""
    if config.downsample == "adapter":
        return Adapter(width, side_width, config.rank)
    if config.downsample == "linear":
        return nn.Linear(width, side_width, bias=False)
    return Pool(config.r, config.downsample)
