"""Finished runs of a study, which can be stopped at any time and started again."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]  # what identifies a run, followed by its results


class RunLog:
    """The file `runs.jsonl` of a folder, with a line for each run; a run in it is not repeated.

    Attributes:
        runs: All runs, those of earlier processes first.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self.runs: list[Run] = [json.loads(line) for line in lines]

    def run(self, key: Run, results: Callable[[], Run]) -> Run:
        """Return the run with the items of `key`; if there is none, add `key | results()`."""
        found = next(iter(matching(self.runs, key)), None)
        if found is None:
            found = key | results()
            self.add(found)
        return found

    def add(self, run: Run) -> None:
        """Append a run, here and to the file."""
        self.runs.append(run)
        with self._path.open("a") as file:
            file.write(f"{json.dumps(run)}\n")


def matching(runs: Iterable[Run], key: Run) -> list[Run]:
    """Return the runs with the items of `key`."""
    return [run for run in runs if key.items() <= run.items()]


def best_rate(runs: Iterable[Run], key: Run) -> float | None:
    """Return the rate with the lowest loss of the runs with the items of `key`; None without any.

    The loss is an item of the run, or of its `scores`.
    """
    tried = matching(runs, key)
    return min(tried, key=lambda run: run.get("scores", run)["loss"])["rate"] if tried else None
