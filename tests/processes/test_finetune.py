"""Whole runs on two processes, with the command and the launcher that a user has."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qft_hf.hf.finetune import finetune, parse_arguments
from qft_hf.hf.finetune.evaluate import evaluate_checkpoint
from qft_hf_cli.evaluate import flags_of
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


def of_a_side_network(flags):
    side = {name: value for name, value in flags.items() if name != "export_dtype"}
    side |= {"method": "qst", "base": "int8", "side_r": 4, "bf16": "true"}
    return side | {"gradient_checkpointing": "true"}


def of_a_classifier(flags, folder):
    tiny_llama(vocab_size=320).model.save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    rows = [{"text": f"the fox {n}", "label": "abc"[n % 3]} for n in range(N_ROWS)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = dict.fromkeys(("train_data", "eval_data"), folder / "labels.jsonl")
    own = {"model_name_or_path": folder / "encoder", "task": "classification", "export_dtype": None}
    return {name: value for name, value in (flags | places | own).items() if value is not None}


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """Files and output of two processes: a run, the same run again, and runs of other kinds."""
    folder = tmp_path_factory.mktemp("two")
    commands = [
        ["finetune", *words(flags, output_dir=folder / "run")],
        ["finetune", *words(flags, output_dir=folder / "run")],
        ["finetune", *words(of_a_side_network(flags), output_dir=folder / "side")],
        ["finetune", *words(of_a_classifier(flags, folder), output_dir=folder / "classifier")],
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
            f"--main_process_port={free_port()}", "-m", "tests.processes.commands", str(folder),
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    said = [
        [(folder / f"{n}-{rank}.txt").read_text() for rank in (0, 1)] for n in range(len(commands))
    ]
    return folder, said


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The same run on one process, which accumulates the micro-batches of both."""
    folder = tmp_path_factory.mktemp("one") / "run"
    changes = {"output_dir": folder, "gradient_accumulation_steps": 2}
    return folder, finetune(parse_arguments(words(flags, **changes)))


def test_two_processes_write_what_one_does(two, one):
    (folder, said), (alone, summary) = two, one
    assert [text.splitlines()[-1] for text in said[0]] == ["exit status 0"] * 2, said[0]
    run = folder / "run"
    names = {path.relative_to(alone) for path in alone.rglob("*")}
    own = {path.relative_to(run) for path in run.rglob("*")}

    assert {path for path in names ^ own if not path.name.startswith("rng_state")} == set()
    for name in ("model.safetensors", "checkpoint-1/model.safetensors"):
        tensors = load_file(run / name)
        for key, expected in load_file(alone / name).items():
            assert torch.equal(tensors[key], expected), (name, key)
    found = json.loads((run / "summary.json").read_text())
    assert found["after"] == pytest.approx(summary.after, rel=1e-5)


def test_the_summary_is_of_all_processes(two, one):
    (folder, said), (_, summary) = two, one
    found = json.loads((folder / "run" / "summary.json").read_text())

    assert len(found["peak_bytes"]) == 2
    assert found["peak_memory"]["bytes"] == max(found["peak_bytes"])
    assert found["trained_tokens"] == summary.trained_tokens > 0
    assert found["tokens_per_second"] == found["trained_tokens"] / found["train_seconds"]
    assert "tokens/s of 2 processes" in said[0][0]
    assert "GB on each of 2, resident memory of the process" in said[0][0]
    assert len(summary.peak_bytes) == 1
    assert "processes" not in str(summary)
    assert "on each of" not in str(summary)


def test_one_process_speaks(two):
    _, said = two
    for text in ("on this process, one of 2", "names no license", "tokens/s", "The first example"):
        assert "".join(said[0]).count(text) == 1, text


def test_what_the_first_process_refuses_stops_all_and_destroys_nothing(two):
    """Later tests read the files, too, and need all of them unchanged."""
    folder, said = two
    run = folder / "run"

    assert "exit status 0" not in "".join(said[1])
    assert "overwrite_output" in said[1][0]
    ended = (folder / "0-0.txt").stat().st_mtime_ns
    assert [path for path in (run, *run.rglob("*")) if path.stat().st_mtime_ns > ended] == []


def test_the_loss_of_a_classifier_is_the_mean_of_all_processes(two):
    """The loss was once the sum, and one process that scored the model later found half of it."""
    folder, said = two
    assert [text.splitlines()[-1] for text in said[3]] == ["exit status 0"] * 2, said[3]
    after = json.loads((folder / "classifier" / "summary.json").read_text())["after"]
    found = evaluate_checkpoint(parse_arguments(flags_of([str(folder / "classifier")])))
    assert found.scores == pytest.approx(after, rel=1e-5)


def test_a_side_network_learns_from_the_examples_of_all_processes(flags, two, tmp_path):
    """The model is scored before training, for which Accelerate prepares it in another way."""
    folder, said = two
    assert [text.splitlines()[-1] for text in said[2]] == ["exit status 0"] * 2, said[2]
    side = of_a_side_network(flags)
    finetune(
        parse_arguments(words(side, output_dir=tmp_path / "one", gradient_accumulation_steps=2))
    )

    assert "owns some rows" not in "".join(said[2])  # each holds all of a side network
    found, expected = (
        load_file(run / "side_network.safetensors") for run in (folder / "side", tmp_path / "one")
    )
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, msg=name)
