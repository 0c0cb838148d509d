"""What fails on one process, or differs between them, is an error on all, and soon."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.processes import trainers
from tests.processes.launch import PATIENCE_SECONDS, REPOSITORY, TIMEOUT_SECONDS, free_port
from tests.processes.test_training import different


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nan-stack", r"^FloatingPointError: .*weights and optimizer state are unchanged"),
        ("nan-skip", r"^$"),
        ("nan-release", r"^FloatingPointError: .*updated but for rows"),
        ("nan-tensor", r"^FloatingPointError: .*updated but for rows"),
        ("other-weights", r"check sum of parameter 0 .*optimizer\.broadcast\(\)"),
        ("other-rate", r"lr of group 0 is 0\.001 on process 0 and 0\.002 on 1"),
        ("second-pass", r"under optimizer\.accumulate\(\)"),
        ("reentrant", r"use_reentrant=False"),
        ("no-consolidation", r"Call optimizer\.consolidate\(\) on all of them"),
        ("trainer-rate", r"learning_rate is 0\.001 on process 0 and 0\.002 on 1.* same arguments"),
        ("trainer-data", r"number of training examples is 36 on process 0 and 37 on 1"),
        ("shards", r"^ValueError: distributed_config splits .*accelerate launch --multi_gpu"),
        ("trainer-reentrant", r"'use_reentrant': False"),
    ],
)
def test_every_process_says_what_is_wrong(case, text, runs):
    for found in runs.two:
        assert re.search(text, found[f"bad:{case}"]["text"]), found[f"bad:{case}"]["text"]


@pytest.mark.parametrize("case", ["nan-stack", "nan-skip", "nan-release", "nan-tensor"])
def test_a_nan_on_one_process_leaves_all_with_the_same_weights(case, runs):
    first, second = (found[f"bad:{case}"] for found in runs.two)

    for moment in ("before", "after", "weights"):
        assert different(first[moment], second[moment]) == []
    if case in ("nan-stack", "nan-skip"):
        assert different(first["before"], first["after"]) == []
    assert first["skipped"] == second["skipped"] == (case == "nan-skip")
    assert different(first["after"], first["weights"]) != []  # and training goes on


@pytest.mark.parametrize("case", ["other-weights", "trainer-model", "trainer-adapters"])
def test_the_model_of_the_first_process_is_given_to_all(case, runs):
    first, second = (found[f"bad:{case}"]["weights"] for found in runs.two)

    assert different(first, second) == []
    if case == "trainer-model":
        assert runs.two[0][f"bad:{case}"]["text"] == ""
        assert different(first, runs.alone["stack"]["weights"]) == []


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of two runs of two processes each, of which one failed and one was killed."""
    folder = tmp_path_factory.mktemp("failures")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes.failures", str(folder)], cwd=REPOSITORY,
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            process.wait(timeout=PATIENCE_SECONDS)
    finally:
        for process in processes:
            process.kill()
    return folder


def test_an_error_on_one_process_is_raised_on_the_other_with_its_text(ended):
    first, second = (torch.load(ended / f"failed-{rank}.pt", weights_only=False) for rank in (0, 1))

    own = "ValueError: the tokens of this batch are out of range"
    assert second["text"] == own
    assert first["text"].startswith("RuntimeError: Process 0 stops because another has failed.")
    assert f"Process 1: {own}" in first["text"]
    assert first["seconds"] < TIMEOUT_SECONDS
    assert different(first["weights"], second["weights"]) == []


def test_the_end_of_one_process_is_an_error_on_the_other_and_the_run_can_be_resumed(ended, runs):
    survivor = torch.load(ended / "killed-0.pt", weights_only=False)

    assert not (ended / "killed-1.pt").exists()
    assert survivor["seconds"] < TIMEOUT_SECONDS
    assert re.search(r"another has ended, .* within 0:00:30", survivor["text"])
    checkpoint = ended / "killed" / f"checkpoint-{trainers.SAVED_AT}"
    trainer = trainers.make("stack", ended / "killed", n=1, n_parts=2)
    trainer.train(resume_from_checkpoint=True)
    assert checkpoint.exists()
    weights = trainers.model_tensors(trainer.model)
    assert different(weights, runs.alone["stack"]["weights"]) == []
