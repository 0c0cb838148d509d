"""A failure on one process, or a difference between processes, is soon an error on all."""

import re

import pytest

from tests.processes import trainers
from tests.processes.launch import TIMEOUT_SECONDS
from tests.processes.test_training import different


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nan-stack", r"^FloatingPointError: .*weights and optimizer state are unchanged"),
        ("nan-skip", r"^$"),
        ("nan-release", r"^FloatingPointError: .*used the finite part"),
        ("nan-previous", r"^FloatingPointError: .*used the finite part"),
        ("nan-tensor", r"^FloatingPointError: .*used the finite part"),
        ("nan-adamw", r"^FloatingPointError: .*used the finite part"),
        ("other-weights", r"checksum of parameter 0 .*optimizer\.broadcast\(\)"),
        ("other-rate", r"lr of group 0 is 0\.001 on process 0 and 0\.002 on 1"),
        ("second-pass", r"under optimizer\.accumulate\(\)"),
        ("sparse", r"^TypeError: .* dense gradients, .*sparse=False"),
        ("skipped-stack", r"given up a step half-way, .*To skip a batch, skip it on all"),
        ("skipped-release", r"given up a step half-way, .*To skip a batch, skip it on all"),
        ("reentrant", r"use_reentrant=False"),
        ("no-consolidation", r"Call optimizer\.consolidate\(\) on all of them"),
        ("loaded-since", r"Call optimizer\.consolidate\(\) on all of them"),
        ("trainer-rate", r"learning_rate is 0\.001 on process 0 and 0\.002 on 1.* same arguments"),
        ("trainer-data", r"number of training examples is 36 on process 0 and 37 on 1"),
        ("trainer-uneven", r"number of batches in an epoch is 3 on .* 2 on 1\..* even_batc"),
        ("trainer-adapters-data", r"number of training examples is 36 on process 0 and 37 on 1"),
        ("trainer-side-seed", r"seed is 5 on process 0 and 6 on 1.* same arguments"),
        ("shards", r"^ValueError: distributed_config splits .*accelerate launch --multi_gpu"),
        ("trainer-sigterm", r"Set enable_jit_checkpoint=False, and save_steps"),
        ("trainer-reentrant", r"'use_reentrant': False"),
        ("trainer-reentrant-unsaid", r"'use_reentrant': False"),
    ],
)
def test_every_process_says_what_is_wrong(case, text, runs):
    for found in runs.two:
        assert re.search(text, found[f"bad:{case}"]["text"]), found[f"bad:{case}"]["text"]


@pytest.mark.parametrize(
    "case", ["nan-stack", "nan-skip", "nan-release", "nan-previous", "nan-tensor", "nan-adamw"]
)
def test_a_nan_on_one_process_leaves_all_with_the_same_weights(case, runs):
    first, second = (found[f"bad:{case}"] for found in runs.two)

    for moment in ("before", "after", "weights"):
        assert different(first[moment], second[moment]) == []
    if case in ("nan-stack", "nan-skip"):
        assert different(first["before"], first["after"]) == []
    assert first["skipped"] == second["skipped"] == (case == "nan-skip")
    assert different(first["after"], first["weights"]) != []  # and training goes on


@pytest.mark.parametrize("case", ["skipped-stack", "skipped-release"])
def test_a_process_that_skips_a_batch_alone_stops_all_soon(case, runs):
    """They waited for its rows until the timeout, or exchanged rows of two batches and aborted."""
    for found in runs.two:
        assert found[f"bad:{case}"]["seconds"] < TIMEOUT_SECONDS / 2


@pytest.mark.parametrize(
    "case", ["other-weights", "trainer-model", "trainer-adapters", "trainer-side"]
)
def test_the_model_of_the_first_process_is_given_to_all(case, runs):
    first, second = (found[f"bad:{case}"]["weights"] for found in runs.two)

    assert different(first, second) == []
    if case == "trainer-model":
        assert runs.two[0][f"bad:{case}"]["text"] == ""
        assert different(first, runs.alone["stack"]["weights"]) == []


@pytest.mark.parametrize("case", ["trainer-full", "stock-full"])
def test_a_checkpoint_that_the_first_process_cannot_write_is_an_error_on_all(case, runs):
    first, second = (found[f"bad:{case}"] for found in runs.two)

    assert re.search("did not finish|File too large|too large", first["text"])
    assert second["text"].startswith("RuntimeError: Process 1 stops because another has failed.")
    assert first["text"] in second["text"]
    for found in (first, second):
        assert found["steps"] == trainers.SAVED_AT
        assert found["seconds"] < TIMEOUT_SECONDS
    assert different(first["weights"], second["weights"]) == []
    if case == "trainer-full":
        assert list((runs.folder / "full-stack").glob("*")) == []


def test_a_run_that_goes_on_with_another_batch_says_so_and_goes_on(runs):
    first, second = (found["bad:trainer-batch"] for found in runs.two)

    said = [line for line in first["text"].splitlines() if "examples per step" in line]
    assert len(said) == 1
    assert re.search(r"from step 2 with 6 examples per step, and had 12 before", said[0])
    assert re.search(r"processes \(2\) times .* \(3\) times .* \(1\) must be 12", said[0])
    assert "examples per step" not in second["text"]  # one process says it
    assert first["steps"] == trainers.N_STEPS
    assert different(first["weights"], second["weights"]) == []


def test_a_run_that_resumes_in_the_processes_of_a_failed_one_has_no_rows_of_it(runs):
    """Updated rows that were in transit when backward failed replaced those of the checkpoint."""
    for found in runs.two:
        resumed = found["bad:trainer-at-once"]
        assert "ValueError: the gradient is refused" in resumed["text"]
        assert different(resumed["weights"], runs.alone["stock-release"]["weights"]) == []


def test_an_error_on_one_process_is_raised_on_the_others_with_its_text(runs):
    *others, last = runs.ended["failed"]

    own = "ValueError: the tokens of this batch are out of range"
    assert last["text"] == own
    for rank, found in enumerate(others):
        text = f"RuntimeError: Process {rank} stops because another has failed."
        assert found["text"].startswith(text)
        assert f"Process 2: {own}" in found["text"]
        assert found["seconds"] < TIMEOUT_SECONDS
        assert different(found["weights"], last["weights"]) == []


def test_a_process_that_is_killed_in_a_step_leaves_the_others_equal_and_the_run_to_resume(runs):
    first, second, killed = runs.ended["killed"]

    assert killed is None
    for found in (first, second):
        assert found["seconds"] < TIMEOUT_SECONDS
        assert re.search(r"stops because another has (ended|failed)", found["text"])
    assert re.search(r"another has ended, .* within 0:00:30", first["text"] + second["text"])
    assert different(first["weights"], second["weights"]) == []
    trainer = trainers.make("stack", runs.folder / "killed", n=1, n_parts=2)
    trainer.train(resume_from_checkpoint=True)
    assert (runs.folder / "killed" / f"checkpoint-{trainers.SAVED_AT}").exists()
    whole = runs.two[0]["trainer:stack/stack-on-3"]  # of three until there, too
    assert different(trainers.model_tensors(trainer.model), whole["weights"]) == []
