"""Plant faults, one at a time, in a copy of the tree, and check that the tests of each fault fail.

    make mutants
    python -m tests.mutants --only 'lion|maximize'

The faults are in the `.toml` files next to this one, a file for each area. A fault is an edit: in
`file`, the text `old`, which occurs once, becomes `new`. With it, one of `tests` must fail, in a
process of its own; without it, they must pass. Exits with 1 if a fault survives, if `old` is not
there or not unique, or if tests do not run or also fail without the fault.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from typing import NoReturn

import pytest

import tests.conftest  # noqa: F401 settings that libraries read when they are imported

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # limit for the tests of one fault
LIBRARIES = ("torch", "numba", "transformers.trainer", "accelerate", "datasets", "peft")
TESTS_FAILED = 1  # of pytest's exit statuses; others say that tests did not run


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        area: The list that contains it.
        name: What is wrong, in a few words.
        kind: What it has in common with similar faults.
        file: The file that is edited, relative to the root.
        old: Text that occurs once there.
        new: Text that replaces it.
        tests: Files or tests, of which one must fail.
    """

    area: str
    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.area}: {self.name} ({self.kind})"

    @property
    def is_compiled_in(self) -> bool:
        """Whether numba's machine code contains it; its cache ignores edits of other files.

        From files outside `kernels/cpu/`, machine code contains constants only.
        """
        is_constant = re.match(r"[A-Z_, ]+ = ", self.old) is not None
        return "kernels/cpu/" in self.file or is_constant

    def apply(self, tree: Path) -> None:
        """Edit the file; raise ValueError unless the old text occurs once."""
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self}: the old text occurs {text.count(self.old)} times in {self.file}, wanted "
                "is once. Mend the list."
            )
        path.write_text(text.replace(self.old, self.new))


def load(folder: Path) -> list[Mutant]:
    """Return all faults of the lists in `folder`."""
    return [
        Mutant(area=path.stem, **{**fault, "tests": tuple(fault["tests"])})
        for path in sorted(folder.glob("*.toml"))
        for fault in tomllib.loads(path.read_text())["fault"]
    ]


def copy_tracked(root: Path, tree: Path) -> None:
    """Copy what git tracks, as it is in the working tree, and link the data."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    if (root / "data").exists():
        (tree / "data").unlink(missing_ok=True)
        (tree / "data").symlink_to((root / "data").resolve())


def run_tests(tree: Path, tests: Sequence[str], numba_cache: Path) -> tuple[int, str]:
    """Return pytest's exit status at the first failure, and the failed test or the output.

    Triton's kernels run in a process of their own, as the interpreter is chosen at import.
    """
    interpreted = [test for test in tests if test.partition("::")[0].endswith("_triton.py")]
    status, output = 0, ""
    for part in ([test for test in tests if test not in interpreted], interpreted):
        if not part or status:
            continue
        with tempfile.TemporaryFile("w+") as file:
            process = os.fork()
            if process == 0:
                _be_pytest(tree, part, numba_cache, file.fileno(), interprets=part is interpreted)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            file.seek(0)
            output = file.read()
    # One space: lines that a test has logged begin with "ERROR" and several spaces.
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    return status, failed[0] if status == TESTS_FAILED and failed else output


def _be_pytest(
    tree: Path, tests: Sequence[str], numba_cache: Path, output: int, *, interprets: bool
) -> NoReturn:
    """Run tests in a fork that has imported nothing of the tree, and exit with their status.

    The fork has the libraries that this process imported, which saves most of the time of a few
    tests. Triton is not among them: it decides at its import whether it interprets.
    """
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ |= {
        "PYTHONPATH": str(tree),  # also for what the tests start
        "NUMBA_CACHE_DIR": str(numba_cache),
        "TRITON_INTERPRET": "1" if interprets else "0",
    }
    signal.alarm(SECONDS)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests]
    if interprets:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    if numba := sys.modules.get("numba"):
        numba.config.reload_config()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this runner
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    status = -1
    try:
        status = int(pytest.main(arguments))
    finally:  # whatever happens, this fork ends here
        sys.stdout.flush()
        os._exit(status & 0xFF)


def plant(mutant: Mutant, root: Path, tree: Path, numba_cache: Path) -> tuple[int, str]:
    """Plant one fault and run its tests; `tree` is a copy of `root` before and after."""
    compiled = Path(cache_from_source(tree / mutant.file))
    mutant.apply(tree)
    compiled.unlink(missing_ok=True)  # Python compares seconds and sizes, which may be equal
    try:
        if not mutant.is_compiled_in:
            return run_tests(tree, mutant.tests, numba_cache)
        with tempfile.TemporaryDirectory() as empty_cache:
            return run_tests(tree, mutant.tests, Path(empty_cache))
    finally:  # with the old modification time, which caches compare
        shutil.copy2(root / mutant.file, tree / mutant.file)
        compiled.unlink(missing_ok=True)


def campaign(mutants: Sequence[Mutant], root: Path) -> int:
    """Plant each fault, print progress and a table; return 0 if all were caught, otherwise 1."""
    caught: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, numba_cache = Path(folder) / "tree", Path(folder) / "numba"
        copy_tracked(root, tree)
        for mutant in mutants:  # a stale list shows at once
            mutant.apply(tree)
            shutil.copy2(root / mutant.file, tree / mutant.file)
        for number, mutant in enumerate(mutants, 1):
            begin = time.monotonic()
            status, output = plant(mutant, root, tree, numba_cache)
            verdict = f"SURVIVED, pytest's status {status}"
            if status == TESTS_FAILED:
                caught[mutant] = output
                verdict = f"caught by {output}"
            seconds = time.monotonic() - begin
            print(f"[{number}/{len(mutants)}] {mutant}: {verdict}, {seconds:.0f} s", flush=True)
            if status not in (0, TESTS_FAILED):
                print(output)
        tests = sorted(set(caught.values()))
        print(f"{len(tests)} tests have seen faults; now they run without any", flush=True)
        status, output = run_tests(tree, tests, numba_cache) if tests else (0, "")
    print(table(mutants, [mutant for mutant in mutants if mutant not in caught]))
    if status:
        print(f"A test fails without any fault, pytest's status {status}: {output}")
    return 0 if len(caught) == len(mutants) and not status else 1


def table(mutants: Sequence[Mutant], survivors: Sequence[Mutant]) -> str:
    """Return the numbers of faults planted and caught, and the survivors, by area, in Markdown."""
    lines = ["| area | planted | caught | survived |", "| --- | ---: | ---: | --- |"]
    for area in [*dict.fromkeys(mutant.area for mutant in mutants), None]:
        planted = [m for m in mutants if area in (m.area, None)]
        survived = [m for m in survivors if area in (m.area, None)]
        names = "" if area is None else "; ".join(m.name for m in survived)
        caught = len(planted) - len(survived)
        lines.append(f"| {area or 'all'} | {len(planted)} | {caught} | {names} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="faults whose area, name, kind or file has this",
    )
    pattern = re.compile(parser.parse_args().only)
    mutants = [m for m in load(Path(__file__).parent) if pattern.search(f"{m} {m.file}")]
    if not mutants:
        parser.error(f"no fault matches {pattern.pattern!r}")
    for name in LIBRARIES:
        import_module(name)
    return campaign(mutants, ROOT)


if __name__ == "__main__":
    sys.exit(main())
