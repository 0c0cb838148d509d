"""The model and data of the studies: a small Llama on bytes, of source code and then of prose.

Both texts come with Python: modules of its standard library, and its language reference from
`pydoc_data`.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

MODULES = (
    "argparse", "ast", "calendar", "configparser", "copy", "dataclasses", "datetime", "decimal",
    "difflib", "doctest", "enum", "functools", "heapq", "inspect", "ipaddress", "mailbox",
    "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform", "random", "shutil",
    "smtplib", "socket", "ssl", "statistics", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "traceback", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
HELD_OUT = 0.1  # the last tenth of each text


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the model and of a batch; `hidden` is a multiple of the head size, 32."""

    hidden: int = 64
    layers: int = 2
    sequence: int = 64
    batch: int = 8


def build(size: Size, kind: Any = LlamaForCausalLM, **more: Any) -> Any:
    """Return an untrained model whose head is not tied to its embedding.

    Args:
        size: Size of the model.
        kind: Its class in transformers.
        more: Further fields of its configuration.
    """
    config = kind.config_class(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=size.sequence,
        tie_word_embeddings=False,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config)


def source_code() -> Tensor:
    """Return the text of some modules of the standard library: uint8 `[n]`."""
    paths = [importlib.util.find_spec(name).origin for name in MODULES]
    return _bytes("\n".join(Path(path).read_text("utf-8") for path in paths))


def prose() -> Tensor:
    """Return the language reference of Python: uint8 `[n]`."""
    return _bytes("\n".join(topics[name] for name in sorted(topics)))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)


def parts(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training part and the held-out part of a text."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def windows(text: Tensor, size: Size, n: int, generator: torch.Generator) -> Tensor:
    """Return `n` random sequences of `text`: int64 `[n, sequence]`."""
    start = torch.randint(len(text) - size.sequence, (n, 1), generator=generator)
    return text[start + torch.arange(size.sequence)].long()


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, size: Size, *, n: int) -> float:
    """Return the mean loss in nats per byte on `n` held-out sequences, the same at every call."""
    ids = windows(parts(text)[1], size, n, torch.Generator().manual_seed(99))
    model.eval()
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in ids.split(64)]
    model.train()
    return float(sum(losses)) / n


def train(
    model: nn.Module,
    optimizer: Optimizer,
    text: Tensor,
    size: Size,
    *,
    n_steps: int,
    seed: int,
    max_grad_norm: float | None = None,
    name: str,
) -> None:
    """Train for `n_steps`; the learning rate falls to a tenth along a half cosine.

    Args:
        model: Model to train, modified in place.
        optimizer: Optimizer of its parameters, with the initial learning rate.
        text: Text whose training part the batches are drawn from.
        size: Size of a batch.
        n_steps: Number of steps, each with one batch.
        seed: Seed of the batches; the same for all ways of training that are compared.
        max_grad_norm: Norm to which gradients are clipped; None for no clipping.
        name: What is trained, shown on the terminal beside the step and the loss.
    """
    batches = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, n_steps, eta_min=0.1 * optimizer.param_groups[0]["lr"]
    )
    learned = parts(text)[0]
    model.train()
    for step in range(n_steps):
        ids = windows(learned, size, size.batch, batches)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 10 == 0 and sys.stderr.isatty():
            shown = f"\r{name}: step {step + 1}, loss {loss.item():.3f} "
            print(shown, end="", file=sys.stderr, flush=True)


def pretrain_(model: nn.Module, size: Size, *, n_steps: int) -> None:
    """Train a model by FP32 AdamW on source code: the start of every way of a study."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    name = f"pretraining, {sum(p.numel() for p in model.parameters()):,} parameters"
    train(model, optimizer, source_code(), size, n_steps=n_steps, seed=1234, name=name)
