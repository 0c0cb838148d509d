"""Damage, interrupts and bad numbers are refused by a message with a name, or make no difference.

Each kind runs a few times here, and many times in `make faults`.
"""

import collections

import pytest

from tests.faults import damage, interrupts, values

SEED = 7


def bad(lines: list[dict], good: set[str]) -> list[dict]:
    return [line for line in lines if line["outcome"] not in good]


def test_damaged_models_are_refused_or_load_as_they_were(tmp_path):
    lines = list(damage.damaged_models(tmp_path, 2 * len(damage.MODELS), SEED))
    assert bad(lines, damage.GOOD) == []
    refused = collections.Counter(line["kind"] for line in lines if line["outcome"] == "refused")
    assert all(refused[f"a bit of {field}"] == 2 for field in damage.FIELDS)


def test_damaged_checkpoints_are_refused_or_resumed_exactly(tmp_path):
    lines = list(damage.damaged_resumes(tmp_path, 27, SEED))
    assert bad(lines, damage.GOOD) == []
    assert len([line for line in lines if line["outcome"] == "refused"]) > 15


def test_no_interrupt_leaves_half_a_step_that_is_accepted():
    lines = list(interrupts.interrupted_steps(2 * len(interrupts.SETTINGS), SEED))
    assert bad(lines, interrupts.GOOD) == []
    assert len({line["outcome"] for line in lines}) > 1


def test_no_interrupt_leaves_half_a_state_that_was_loaded():
    lines = list(interrupts.interrupted_loads(3 * len(interrupts.SETTINGS), SEED))
    assert bad(lines, interrupts.GOOD) == []
    assert {line["outcome"] for line in lines} == {"as before", "whole"}


@pytest.mark.parametrize("seed", range(2))
def test_bad_numbers_move_nothing(seed):
    lines = list(values.bad_values(36, seed))
    assert bad(lines, {"refused"}) == []
    assert len({line["kind"] for line in lines}) == 6
