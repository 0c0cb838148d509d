"""The runner of planted faults, tested on a tree of two files."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, Mutant, campaign, load

# Runs in a process of its own, as in practice, because it forks.
RUN = """
import sys
from pathlib import Path
from tests.mutants.__main__ import campaign, load
root = Path(sys.argv[1])
sys.exit(campaign(load(root / "lists"), root))
"""


def fault(name="adds", kind="sign", old="x - 1", new="x + 1", test="test_steps_down") -> str:
    return f"""
[[fault]]
name = "{name}"
kind = "{kind}"
file = "rule.py"
old = "{old}"
new = "{new}"
tests = ["test_rule.py::{test}"]
"""


@pytest.fixture
def root(tmp_path):
    """Make a repository of a rule, a test that sees its faults, and one that sees half of them."""
    files = {
        "rule.py": "def step(x):\n    return x - 1\n",
        "test_rule.py": "from rule import step\n\n\n"
        "def test_steps_down():\n    assert step(2) == 1\n\n\n"
        "def test_does_not_rise():\n    assert step(2) <= 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def run(root: Path, *faults: str) -> tuple[int, str]:
    """Return the exit status of a campaign and its output."""
    (root / "lists").mkdir()
    (root / "lists" / "rules.toml").write_text("".join(faults))
    command = [sys.executable, "-c", RUN, str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_fault_that_no_test_sees_survives_by_name(root):
    status, told = run(
        root, fault(), fault("does not step", "forgotten term", new="x", test="test_does_not_rise")
    )

    assert status == 1
    assert "rules: adds (sign): caught by test_rule.py::test_steps_down" in told
    assert "| rules | 2 | 1 | does not step |" in told
    assert "x - 1" in (root / "rule.py").read_text()


def test_all_caught_is_a_success(root):
    status, told = run(root, fault())

    assert status == 0
    assert "| all | 1 | 1 |  |" in told


def test_a_test_that_logs_an_error_is_known_by_its_name(root):
    text = (root / "test_rule.py").read_text()
    logs = "    logging.error('as it should')\n    assert step(2) == 1"
    (root / "test_rule.py").write_text(
        "import logging\n" + text.replace("    assert step(2) == 1", logs)
    )

    assert run(root, fault())[0] == 0


@pytest.mark.parametrize(("old", "times"), [("y - 1", 0), ("x", 2)])
def test_an_edit_whose_text_does_not_occur_once_is_stale(root, old, times):
    stale = Mutant("rules", "stale", "sign", "rule.py", old, "z", ("test_rule.py",))

    with pytest.raises(ValueError, match=rf"stale.*occurs {times} times in rule\.py.*Mend"):
        campaign([stale], root)


def test_every_edit_of_the_lists_finds_its_text_once():
    """A change of a line that a fault edits must change the fault too."""
    mutants = load(ROOT / "tests" / "mutants")

    assert len(mutants) > 300
    assert [
        str(mutant) for mutant in mutants if (ROOT / mutant.file).read_text().count(mutant.old) != 1
    ] == []


def test_every_test_of_the_lists_is_there():
    missing = []
    for name in {name for mutant in load(ROOT / "tests" / "mutants") for name in mutant.tests}:
        path, _, test = name.partition("::")
        text = (ROOT / path).read_text()
        if test and f"def {test.partition('[')[0]}(" not in text:
            missing.append(name)

    assert missing == []


@pytest.mark.parametrize(
    "changes", [{"new": "x -"}, {"test": "test_gone"}], ids=["not Python", "no such test"]
)
def test_tests_that_do_not_run_have_caught_nothing(root, changes):
    status, told = run(root, fault(**changes))

    assert status == 1
    assert "SURVIVED, pytest's status 4" in told


def test_a_test_that_fails_in_any_case_has_caught_nothing(root):
    with (root / "test_rule.py").open("a") as file:
        file.write("\n\ndef test_broken():\n    assert step(2) == 7\n")

    status, told = run(root, fault(test="test_broken"))

    assert status == 1
    assert "A test fails without any fault, pytest's status 1: test_rule.py::test_broken" in told
