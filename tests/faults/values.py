"""Give optimizers invalid numbers, wherever numbers enter, and check that no bit changes."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qft_hf import QFTSGD, QFTAdamW, QFTLion, QFTTrainingArguments
from qft_hf.hf.optimizers import check_arguments
from tests.optim.test_release import batches, everything, loss_of, make_optimizer, network

NAN, INF = float("nan"), float("inf")
NUMBERS = (NAN, INF, -INF, -1.0, -1e-30, 1e39, "x", None, [1.0], 1j)
STEPS = (-3, 1.5, INF, 2**63 - 1, 2**70, "x", None, [1, 2])
BAD: dict[str, tuple] = {
    "lr": NUMBERS,
    "weight_decay": NUMBERS,
    "seed": (-1, 2**63, 1.5, NAN, "x", None),
    "betas": ((2, 0.9), (0.9, NAN), (-0.1, 0.9), (0.9, 1.0), (0.9,), None, 0.9, ("a", 0.9)),
    "eps": (NAN, INF, -1.0, "x", None),
}
FIELDS = {"lr": "learning_rate", "seed": "quantization_seed"}
TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.double(),
    lambda t: t[:-1] if t.ndim else t - 99,
    lambda t: torch.full_like(t, -128) if t.dtype == torch.int8 else t.to(torch.float16),
    lambda t: t.tolist() if t.ndim else None,
    lambda t: t.float() * NAN,
)
KINDS = (QFTLion, QFTAdamW, QFTSGD)


def bad_values(n: int, seed: int) -> Iterator[dict]:
    """Give `n` bad values, each of which must be refused before anything changes."""
    chance = random.Random(seed)
    places = [_constructor, _group, _added_group, _loaded_group, _loaded_state, _arguments]
    data = batches(3)
    for number in range(n):
        kind = KINDS[number % len(KINDS)]
        gradient = ("stack", "release")[number // len(KINDS) % 2]
        model = network()
        optimizer = make_optimizer(model, gradient, kind)
        loss_of(model, data[0]).backward()
        optimizer.step()
        before = [tensor.clone() for tensor in everything(model, optimizer)]
        place = places[number // 2 // len(KINDS) % len(places)]
        name = chance.choice([one for one in BAD if one in optimizer.defaults])
        value = chance.choice(BAD[name])

        def train(model: Any = model, optimizer: Any = optimizer) -> None:
            loss_of(model, data[1]).backward()
            optimizer.step()

        detail = f"{kind.__name__} {gradient} {name}={value!r}"
        try:
            place(optimizer, name, value, chance, train)
        except (ValueError, TypeError) as error:
            told = str(error)
            names = (name, FIELDS.get(name, name), "learning_rate", "beta", "state", "parameter")
            outcome = "refused" if any(one in told for one in names) else f"raw: {told[:80]}"
        except Exception as error:  # noqa: BLE001 the error is what is judged
            outcome = f"raw: {type(error).__name__} {error}"[:120]
        else:
            outcome = "accepted"
        after = everything(model, optimizer)
        if len(after) != len(before) or not all(map(torch.equal, before, after)):
            outcome = "weights or state moved"
        kind_of_place = place.__name__.strip("_").replace("_", " ")
        yield {"campaign": "values", "kind": kind_of_place, "outcome": outcome, "detail": detail}


def _constructor(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    type(optimizer)([torch.nn.Parameter(torch.ones(2))], **{name: value})


def _group(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    """Set the value as a scheduler does."""
    optimizer.param_groups[0][name] = value
    train()


def _added_group(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: value})


def _loaded_group(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][name] = value
    optimizer.load_state_dict(state)


def _loaded_state(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    one = state["state"][chance.choice(list(state["state"]))]
    key = chance.choice(list(one))
    one[key] = chance.choice(STEPS) if key == "step" else chance.choice(TENSORS)(one[key])
    optimizer.load_state_dict(state)


def _arguments(optimizer: Any, name: str, value: Any, chance: Any, train: Any) -> None:
    given = {FIELDS.get(name, name): value}
    if name == "betas":
        given = {"beta1": chance.choice([NAN, 2.0, -1.0, "x"])}
    if None in given.values():
        given = {"learning_rate": NAN}  # None: not given
    optim = {QFTLion: "qft_lion", QFTAdamW: "qft_adamw", QFTSGD: "qft_sgd"}[type(optimizer)]
    check_arguments(QFTTrainingArguments(output_dir="unused", optim=optim, use_cpu=True, **given))
