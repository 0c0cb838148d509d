"""A small model with odd sizes, biases, a norm, and a head that may be tied."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

N_TOKENS = 37
WIDTH = 21
HIDDEN = 300  # more than one gradient group of 256


class SmallModel(nn.Module):
    """Embedding, two residual blocks, a norm and a head; logits for every position."""

    def __init__(self, *, tied: bool = True, seed: int = 0, reentrant: bool | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(N_TOKENS, WIDTH, padding_idx=3)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, N_TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant = reentrant  # kind of activation checkpointing; None: none

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor) -> Tensor:
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Block(nn.Module):
    """`x + down(gelu(up(x)))`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def batch(seed: int = 0, shape: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randint(0, N_TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest plain float tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if type(result) is torch.Tensor and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


class Alive(TorchDispatchMode):
    """Records how many elements of large float tensors exist at a time, views not counted.

    Args:
        at_least: Number of elements from which a tensor is large.
    """

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.elements, self._alive = at_least, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for made in result if isinstance(result, tuple | list) else (result,):
            is_float = type(made) is Tensor and made.is_floating_point()
            if is_float and made.numel() >= self.at_least:
                storage = made.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage), made.numel()
        self._alive = {place: kept for place, kept in self._alive.items() if kept[0]() is not None}
        self.elements = max(self.elements, sum(n for _, n in self._alive.values()))
        return result
