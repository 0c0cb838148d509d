"""Run the campaigns and print their table.

python -m tests.faults --models 1000 --resumes 500 --interrupts 240 --values 600 --kills 100
"""

import argparse
import collections
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.faults import campaign, damage, interrupts, values

DEFAULTS = {
    "models": 1000, "resumes": 500, "interrupts": 240, "values": 600, "kills": 100,
    "full-disks": 50, "seed": 0,
}  # fmt: skip
GOOD = damage.GOOD | interrupts.GOOD | {"exact"}


def campaigns(options: argparse.Namespace, work: Path) -> Iterator[dict]:
    """Yield every damage of every campaign, with its outcome."""
    for name in ("models", "resumes"):
        (work / name).mkdir()
    yield from damage.damaged_models(work / "models", options.models, options.seed)
    yield from damage.damaged_resumes(work / "resumes", options.resumes, options.seed)
    yield from interrupts.interrupted_steps(options.interrupts, options.seed)
    yield from interrupts.interrupted_loads(options.interrupts // 4, options.seed)
    yield from values.bad_values(options.values, options.seed)
    if options.kills or options.full_disks:
        (work / "kills").mkdir()
        campaign.prepare_inputs(work / "kills")
    for way, n in (("kills", options.kills), ("full disks", options.full_disks)):
        for entry in campaign.ENTRIES:
            for line in campaign.kill_runs(
                entry, work / "kills", kills=n, seed=options.seed, full=way == "full disks"
            ):
                outcome = "; ".join(line["problems"])[-300:] or "exact"
                yield {"campaign": way, "kind": entry, "outcome": outcome,
                       "detail": f"{line['kill']} {line['n']} of {line['of']}"}  # fmt: skip


def main() -> None:
    """Print bad outcomes as they occur, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    begin, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for line in campaigns(options, Path(folder)):
            counter = counts.setdefault((line["campaign"], line["kind"]), collections.Counter())
            counter[line["outcome"]] += 1
            if line["outcome"] not in GOOD:
                bad += 1
                print(json.dumps(line), flush=True)  # noqa: T201
    rows = ["| campaign | kind | n | outcomes |", "| --- | --- | --- | --- |"]
    for (name, kind), counter in counts.items():
        shown = ", ".join(f"{n} {outcome}" for outcome, n in counter.most_common())
        rows.append(f"| {name} | {kind} | {counter.total()} | {shown} |")
    print("\n".join(rows))  # noqa: T201
    total = sum(counter.total() for counter in counts.values())
    print(f"\n{total} in {time.perf_counter() - begin:.0f} s, {bad} bad")  # noqa: T201
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
