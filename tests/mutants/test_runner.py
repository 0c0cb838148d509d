"""The runner of planted faults, on a tree of two files."""

import subprocess

import pytest

from tests.mutants.__main__ import Mutant, campaign, load

FAULTS = """
[[fault]]
name = "adds"
kind = "sign"
file = "rule.py"
old = "x - 1"
new = "x + 1"
tests = ["test_rule.py::test_steps_down"]

[[fault]]
name = "does not step"
kind = "forgotten term"
file = "rule.py"
old = "x - 1"
new = "x"
tests = ["test_rule.py::test_does_not_rise"]
"""


@pytest.fixture
def tree(tmp_path):
    """A repository with a rule, a test that sees its faults, and one that sees half of them."""
    files = {
        "rule.py": "def step(x):\n    return x - 1\n",
        "test_rule.py": "from rule import step\n\n\n"
        "def test_steps_down():\n    assert step(2) == 1\n\n\n"
        "def test_does_not_rise():\n    assert step(2) <= 2\n",
        "lists/rules.toml": FAULTS,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def test_a_fault_that_no_test_sees_survives_by_name(tree, capsys):
    assert campaign(load(tree / "lists"), tree) == 1

    told = capsys.readouterr().out
    assert "rules: adds (sign): caught by test_rule.py::test_steps_down" in told
    assert "| rules | 2 | 1 | does not step |" in told
    assert "x - 1" in (tree / "rule.py").read_text()


def test_all_caught_is_a_success(tree):
    assert campaign(load(tree / "lists")[:1], tree) == 0


@pytest.mark.parametrize(("old", "times"), [("y - 1", 0), ("x", 2)])
def test_an_edit_whose_text_does_not_occur_once_is_stale(tree, old, times):
    stale = Mutant("rules", "stale", "sign", "rule.py", old, "z", ("test_rule.py",))

    with pytest.raises(ValueError, match=rf"stale.*occurs {times} times in rule\.py.*Mend"):
        campaign([stale], tree)


@pytest.mark.parametrize(
    ("new", "test", "status"), [("x -", "test_rule.py", 2), ("x", "test_rule.py::test_gone", 4)]
)
def test_tests_that_do_not_run_have_caught_nothing(tree, capsys, new, test, status):
    fault = Mutant("rules", "broken", "sign", "rule.py", "x - 1", new, (test,))

    assert campaign([fault], tree) == 1
    assert f"pytest's status {status}" in capsys.readouterr().out
