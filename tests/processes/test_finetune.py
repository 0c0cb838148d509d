"""A whole run on two processes, started as a user starts it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qft_hf.hf.finetune import finetune, parse_arguments
from tests.finetune.chats import chat, tiny_tokenizer
from tests.models import tiny_llama
from tests.processes.launch import PATIENCE_SECONDS, REPOSITORY, free_port

N_ROWS = 8


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), tied=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"messages": chat("how are you?", "fine, " * (n + 1))} for n in range(N_ROWS)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": folder / "model",
        "train_data": folder / "chats.jsonl",
        "eval_data": folder / "chats.jsonl",
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "export_dtype": "bfloat16",
        "use_cpu": "true",
        "ddp_timeout": 120,
    }


def words(flags, **changes):
    return [f"--{name}={value}" for name, value in {**flags, **changes}.items()]


def launch(flags, **changes):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        f"--main_process_port={free_port()}", "-m", "qft_hf", "finetune", *words(flags, **changes),
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """What two processes have written, and said."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(flags, output_dir=folder / "run")
    assert done.returncode == 0, done.stderr[-8000:]
    return folder / "run", done


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The same steps, whose micro-batches one process accumulates."""
    folder = tmp_path_factory.mktemp("one") / "run"
    changes = {"output_dir": folder, "gradient_accumulation_steps": 2}
    return folder, finetune(parse_arguments(words(flags, **changes)))


def test_two_processes_write_what_one_does(two, one):
    (folder, _), (alone, summary) = two, one
    names = {path.relative_to(alone) for path in alone.rglob("*")}
    own = {path.relative_to(folder) for path in folder.rglob("*")}

    assert {path for path in names ^ own if not path.name.startswith("rng_state")} == set()
    for name in ("model.safetensors", "checkpoint-1/model.safetensors"):
        tensors = load_file(folder / name)
        for key, expected in load_file(alone / name).items():
            assert torch.equal(tensors[key], expected), (name, key)
    found = json.loads((folder / "summary.json").read_text())
    assert found["after"] == pytest.approx(summary.after, rel=1e-5)


def test_the_summary_is_of_all_processes(two, one):
    (folder, done), (_, summary) = two, one
    found = json.loads((folder / "summary.json").read_text())

    assert len(found["peak_bytes"]) == 2
    assert found["peak_memory"]["bytes"] == max(found["peak_bytes"])
    assert found["trained_tokens"] == summary.trained_tokens > 0
    assert found["tokens_per_second"] == found["trained_tokens"] / found["train_seconds"]
    assert "tokens/s of 2 processes" in done.stdout
    assert "GB on each of 2, resident memory of the process" in done.stdout
    assert len(summary.peak_bytes) == 1
    assert "processes" not in str(summary)
    assert "on each of" not in str(summary)


def test_one_process_speaks(two):
    _, done = two
    output = done.stdout + done.stderr
    for text in ("on this process, one of 2", "names no licence", "tokens/s", "The first example"):
        assert output.count(text) == 1, text


def test_what_the_first_process_refuses_stops_all_and_destroys_nothing(flags, two):
    folder, _ = two
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = launch(flags, output_dir=folder)

    assert done.returncode != 0
    assert "overwrite_output" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_side_network_learns_from_the_examples_of_all_processes(flags, tmp_path):
    """Though the model is scored before training, which Accelerate prepares it for otherwise."""
    side = {name: value for name, value in flags.items() if name != "export_dtype"}
    side |= {"method": "qst", "base": "int8", "side_r": 4, "bf16": "true"}
    side["gradient_checkpointing"] = "true"
    done = launch(side, output_dir=tmp_path / "two")
    assert done.returncode == 0, done.stderr[-8000:]
    finetune(
        parse_arguments(words(side, output_dir=tmp_path / "one", gradient_accumulation_steps=2))
    )

    assert "owns some rows" not in done.stdout + done.stderr  # each holds all of a side network
    two, one = (load_file(tmp_path / run / "side_network.safetensors") for run in ("two", "one"))
    assert two.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, msg=name)
