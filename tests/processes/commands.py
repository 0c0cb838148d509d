"""Does several commands of `qft-hf`, one after the other, on this process of several.

accelerate launch --multi_gpu --num_processes=2 -m tests.processes.commands FOLDER

The words of each are in `FOLDER/commands.json`; what process R has said and come to in command N is
in `N-R.txt`, with its exit status or error last.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from qft_hf_cli import main


def do(words: list[str], said: Path) -> None:
    """Run a command as a process of its own would end it."""
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
