"""Runs programs in processes that have imported transformers, but not qft_hf.

Each is a fork of a process that has imported transformers' Trainer, which takes longer than most
tests. Where nothing may be imported yet, or variables of the environment differ, use `subprocess`.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["transformers.trainer"])


def run_fresh(program: str | Path, *arguments: object, folder: Path | None = None) -> None:
    """Run a program, and raise if it fails; see `try_fresh`."""
    done = try_fresh(program, *arguments, folder=folder)
    if done.returncode:
        raise AssertionError(f"{done.stdout[-3000:]}\n{done.stderr[-9000:]}")


def try_fresh(
    program: str | Path, *arguments: object, folder: Path | None = None
) -> CompletedProcess[str]:
    """Run a program as `python` does, and return its exit status and output.

    Args:
        program: Source code, or the path of a script.
        arguments: Become `sys.argv[1:]` as texts.
        folder: Where it runs; None: the current folder.
    """
    words = [str(argument) for argument in arguments]
    with TemporaryDirectory() as outputs:
        process = _FORKS.Process(target=_run, args=(program, words, folder or Path.cwd(), outputs))
        process.start()
        process.join()
        printed = [Path(outputs, name).read_text() for name in ("stdout", "stderr")]
    return CompletedProcess([str(program), *words], process.exitcode or 0, *printed)


def _run(program: str | Path, words: list[str], folder: Path, outputs: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{outputs}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.chdir(folder)
    sys.argv = [str(program), *words]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})
