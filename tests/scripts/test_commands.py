"""All commands explain themselves, and a flag is spelled the same way wherever it is."""

import re
import runpy
import sys

import pytest

from tests.scripts.commands import COMMANDS, SCRIPTS, load

MEASURING = [name for name, path in COMMANDS.items() if path.parent != SCRIPTS]


@pytest.fixture(scope="module")
def shown():
    """What `--help` prints, by command; run in a process of its own it would take seconds each."""
    texts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for name, path in COMMANDS.items():
            with patch.context() as inner:
                inner.chdir(SCRIPTS.parent)
                inner.setenv("HF_HUB_OFFLINE", "1")
                inner.syspath_prepend(str(path.parent))
                inner.setattr(sys, "argv", [str(path), "--help"])
                lines: list[str] = []
                inner.setattr(
                    "argparse.ArgumentParser._print_message",
                    lambda self, message, file=None, lines=lines: lines.append(message),
                )
                with pytest.raises(SystemExit) as stopped:
                    runpy.run_path(str(path), run_name="__main__")
            texts[name] = "".join(lines)
            assert stopped.value.code == 0
    return texts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_docstring(name, shown):
    first_line = (load(name).__doc__ or "").splitlines()[0]
    assert first_line in shown[name]


@pytest.mark.parametrize("name", MEASURING)
def test_a_measuring_command_writes_its_report_into_a_folder(name, shown):
    assert re.search(r"--output OUTPUT +folder of the report", shown[name])


def test_flags_have_underscores_and_one_name(shown):
    flags = {flag for name in MEASURING for flag in re.findall(r"  (--[\w-]+)", shown[name])}
    assert len(flags) > 15
    assert [flag for flag in sorted(flags) if "-" in flag[2:]] == []
    assert not flags & {"--sequence", "--sequence_lengths", "--batch", "--lr", "--lrs", "--json"}
