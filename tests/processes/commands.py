"""Run several commands of `qft-hf`, one after the other, on one of several processes.

accelerate launch --multi_gpu --num_processes=2 -m tests.processes.commands FOLDER

`FOLDER/commands.json` has the words of each command. `N-R.txt` gets the output of command N on
process R, with its exit status or error last.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from qft_hf_cli import main


def do(words: list[str], said: Path) -> None:
    """Run a command, and print the exit status that a process of its own would have."""
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        status = 0
        try:
            main(words)
        except SystemExit as ended:
            status = ended.code
        except Exception:  # noqa: BLE001 Python itself would print it
            traceback.print_exc()
            status = 1
        print(f"exit status {status}")  # noqa: T201
        sys.stdout.flush()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for number, words in enumerate(json.loads((folder / "commands.json").read_text())):
        do(words, folder / f"{number}-{os.environ['RANK']}.txt")
