"""All commands have a help text, and a flag is spelled the same way in all of them."""

import re
from importlib import import_module

import pytest

from tests.scripts.commands import COMMANDS, SCRIPTS, help_of, load

MEASURING = [
    name for name, path in COMMANDS.items() if path.parent.name in ("benchmarks", "studies")
]


THIN = {"estimate_memory": "plan", "export": "export", "finetune": "finetune"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_docstring(name):
    module = import_module(f"qft_hf_cli.{THIN[name]}") if name in THIN else load(name)
    first_line = (module.__doc__ or "").splitlines()[0]
    assert first_line in help_of(name)


@pytest.mark.parametrize("name", MEASURING)
def test_a_measuring_command_writes_its_report_into_a_folder(name):
    assert re.search(r"--output OUTPUT +folder of the report", help_of(name))


def test_flags_have_underscores_and_one_name():
    flags = {flag for name in MEASURING for flag in re.findall(r"  (--[\w-]+)", help_of(name))}
    assert len(flags) > 15
    assert [flag for flag in sorted(flags) if "-" in flag[2:]] == []
    assert not flags & {"--sequence", "--sequence_lengths", "--batch", "--lr", "--lrs", "--json"}


def test_scripts_at_the_top_are_those_that_users_call():
    top = {path.stem for path in SCRIPTS.glob("*.py")}
    assert top == {"demo", "estimate_memory", "evaluate_plain", "export", "fetch_demo", "finetune"}
