"""Damage models and checkpoints in one place each, and load or resume them.

Good outcomes: `refused` by an error that names the file or the tensor; `same`, the bits of the
undamaged one, if the damaged part is never read or was repaired by reading; `told`, by a warning
that names what was left out. All others are faults of ours: `different` bits without a warning, or
a `raw` error that names nothing.
"""

import contextlib
import dataclasses
import io
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from qft_hf import QFTConfig, QFTTrainer, quantize_model_
from qft_hf.hf.checkpoint import MARK
from tests.hf.test_trainer import trainer_on
from tests.models import tiny_llama

GOOD = {"refused", "same", "told"}
RAW = (KeyError, IndexError, AttributeError, AssertionError, UnicodeError)
Chance = random.Random
Damage = Callable[[Path, Chance], None]


# --- one place of a file


def header_bit(path: Path, chance: Chance) -> None:
    """Flip a bit of the header: names, types, shapes, offsets and checksums."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[chance.randrange(8 + size)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def bit_of(suffix: str) -> Damage:
    """Return a damage that flips a bit of one of the tensors whose names end in `suffix`."""

    def damage(path: Path, chance: Chance) -> None:
        content = bytearray(path.read_bytes())
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        names = [n for n in header if n.endswith(suffix) and n != "__metadata__"]
        start, end = header[chance.choice(names or list(header.keys() - {"__metadata__"}))][
            "data_offsets"
        ]
        content[8 + size + chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

    return damage


def any_bit(path: Path, chance: Chance) -> None:
    """Flip a bit anywhere."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: Chance) -> None:
    """Cut off the end of the file."""
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def hole(path: Path, chance: Chance) -> None:
    """Set 512 bytes to 0, as after the loss of a disk block."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(max(1, len(content) - 512))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def remove(path: Path, chance: Chance) -> None:
    """Delete the file."""
    path.unlink()


# --- models


def of_weights(damage: Damage) -> Damage:
    """Return the same damage for one of the weight files of a model."""
    return lambda folder, chance: damage(
        chance.choice(sorted(folder.glob("*.safetensors"))), chance
    )


def of_config(damage: Damage) -> Damage:
    """Return the same damage for the config.json of a model."""
    return lambda folder, chance: damage(folder / "config.json", chance)


def edit_config(folder: Path, chance: Chance) -> None:
    """Change a value that decides which tensors a model has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    storage = config["quantization_config"]
    edits: list[Callable[[], object]] = [
        lambda: config.pop("quantization_config"),
        lambda: storage.pop("quant_method"),
        lambda: storage.update(quant_method=chance.choice(["qtf", "QFT", 7])),
        lambda: storage.update(group_size=chance.choice([1, 8, 40, -3, "x"])),
        lambda: storage.update(outlier_fraction=chance.choice([0.0, 0.3, 2, None])),
        lambda: storage.update(modules_to_not_convert=[chance.choice(["lm_head", "up_proj"])]),
        lambda: storage.update(bits=4),
        lambda: config.update(hidden_size=chance.choice([40, 48])),
        lambda: config.update(intermediate_size=chance.choice([64, 80])),
        lambda: config.update(vocab_size=chance.choice([130, 140])),
        lambda: config.update(num_hidden_layers=chance.choice([1, 3])),
    ]
    chance.choice(edits)()
    path.write_text(json.dumps(config))


def swap_shards(folder: Path, chance: Chance) -> None:
    """Swap the names of two shards."""
    one, other = chance.sample(sorted(folder.glob("model-*")), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def foreign_shard(folder: Path, chance: Chance) -> None:
    """Replace a shard by that of another checkpoint of the same model."""
    shard = chance.choice(sorted(folder.glob("model-*")))
    shutil.copy(folder.parent / "foreign" / shard.name, shard)


def second_copy(folder: Path, chance: Chance) -> None:
    """Replace a shard by a copy of another one."""
    one, other = chance.sample(sorted(folder.glob("model-*")), 2)
    shutil.copy(one, other)


def edit_index(folder: Path, chance: Chance) -> None:
    """Delete an entry of the index, or make it name another shard."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = chance.choice(sorted(index["weight_map"]))
    if chance.random() < 0.5:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = chance.choice(sorted(set(index["weight_map"].values())))
    path.write_text(json.dumps(index))


FIELDS = ("weight_q", "weight_scale", "outlier_value", "outlier_column", "norm.weight")
MODELS: dict[str, tuple[str, Damage]] = {
    **{f"a bit of {field}": ("one", of_weights(bit_of(field))) for field in FIELDS},
    "a bit of a shard": ("shards", of_weights(any_bit)),
    "a bit of the header": ("one", of_weights(header_bit)),
    "weights cut off": ("one", of_weights(truncate)),
    "a shard cut off": ("shards", of_weights(truncate)),
    "a hole of zeros": ("one", of_weights(hole)),
    "a shard missing": ("shards", of_weights(remove)),
    "shards swapped": ("shards", swap_shards),
    "a shard twice": ("shards", second_copy),
    "a shard of another model": ("shards", foreign_shard),
    "the index edited": ("shards", edit_index),
    "config.json edited": ("one", edit_config),
    "config.json cut off": ("one", of_config(truncate)),
    "config.json missing": ("one", of_config(remove)),
}


def damaged_models(work: Path, n: int, seed: int) -> Iterator[dict]:
    """Damage a model `n` times, kind by kind, and load it."""
    transformers_logging.disable_progress_bar()
    chance = random.Random(seed)
    model = quantize_model_(tiny_llama(), QFTConfig())
    model.save_pretrained(work / "one")
    model.save_pretrained(work / "shards", max_shard_size="9KB")
    expected = model.state_dict()
    foreign = quantize_model_(tiny_llama(seed=1), QFTConfig())
    foreign.save_pretrained(work / "foreign", max_shard_size="9KB")
    kinds = list(MODELS)
    for number in range(n):
        kind = kinds[number % len(kinds)]
        source, damage = MODELS[kind]
        folder = work / "damaged"
        shutil.copytree(work / source, folder)
        damage(folder, chance)
        outcome, detail = _loaded(folder, expected)
        yield {"campaign": "models", "kind": kind, "outcome": outcome, "detail": detail}
        shutil.rmtree(folder)


def _loaded(folder: Path, expected: dict) -> tuple[str, str]:
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    except Exception as error:  # noqa: BLE001 the error is what is judged
        return _judged(error, folder, told)
    finally:
        logger.removeHandler(handler)
    if state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state):
        return "same", ""
    named = [text for text in told if "model.layers." in text]
    return ("told", named[0][:200]) if named else ("different", "")


def _judged(error: BaseException, folder: Path, told: Iterable[str] = ()) -> tuple[str, str]:
    """Return whether an error says what is wrong, and its text."""
    text = f"{type(error).__name__}: {error}"
    names = [path.name for path in folder.rglob("*")] + ["config.json", "model.layers", "lm_head"]
    names += ["embed_tokens", "model.norm", "safetensors", folder.name]
    names += ["QFTConfig", "quant_method", *(field.name for field in dataclasses.fields(QFTConfig))]
    if "See the above report" in text or "look at the above report" in text:
        text += " ".join(told)  # transformers logs a table of the tensors
    is_raw = isinstance(error, RAW) or not any(name in text for name in names)
    return ("raw" if is_raw else "refused"), text[:300]


# --- resumes

CHECKPOINT_FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "config.json", "training_args.bin", MARK,
)  # fmt: skip
KINDS: dict[str, Damage] = {
    "a bit": any_bit, "cut off": truncate, "a hole of zeros": hole, "missing": remove,
    "of another step": lambda path, chance: shutil.copy(
        path.parent.parent / "checkpoint-2" / path.name, path
    ),
    "of another run": lambda path, chance: shutil.copy(
        path.parent.parent.parent / "foreign" / "checkpoint-4" / path.name, path
    ),
}  # fmt: skip
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def _run(folder: Path, resume: Path | None = None, **overrides: object) -> QFTTrainer:
    trainer = trainer_on(tiny_llama(tied=True), folder, QFTTrainer, **{**RUN, **overrides})
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def _end(trainer: QFTTrainer) -> list:
    momentum = trainer.optimizer.optimizer.state_dict()["state"]
    log = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    tensors = [*trainer.model.state_dict().values()]
    tensors += [value for key in sorted(momentum) for value in momentum[key].values()]
    return [log, tensors]


def damaged_resumes(work: Path, n: int, seed: int) -> Iterator[dict]:
    """Damage a file of a checkpoint `n` times, and resume from it."""
    transformers_logging.disable_progress_bar()
    chance = random.Random(seed)
    expected = _end(_run(work / "straight"))
    shutil.rmtree(work / "straight" / "checkpoint-6")
    _run(work / "foreign", learning_rate=3e-3, seed=5)
    cases = [(kind, name) for kind in KINDS for name in CHECKPOINT_FILES]
    for number in range(n):
        kind, name = cases[number % len(cases)]
        folder = work / "run"
        shutil.copytree(work / "straight", folder)
        checkpoint = folder / "checkpoint-4"
        KINDS[kind](checkpoint / name, chance)
        outcome, detail = _resumed(folder, checkpoint, expected)
        yield {"campaign": "resumes", "kind": f"{name}: {kind}", "outcome": outcome,
               "detail": detail}  # fmt: skip
        shutil.rmtree(folder)


def _resumed(folder: Path, checkpoint: Path, expected: list) -> tuple[str, str]:
    try:
        trainer = _run(folder, checkpoint, save_strategy="no")
    except Exception as error:  # noqa: BLE001 the error is what is judged
        return _judged(error, folder)
    log, tensors = _end(trainer)
    is_same = log == expected[0] and len(tensors) == len(expected[1])
    is_same = is_same and all(map(torch.equal, tensors, expected[1]))
    return ("same" if is_same else "different"), ""
