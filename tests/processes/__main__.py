"""Do runs on this process of several, and save what each has come to.

torchrun --nproc-per-node 2 -m tests.processes FOLDER optimizer:stack trainer:release ...
"""

import sys
from pathlib import Path

from tests.processes.work import do

if __name__ == "__main__":
    do(Path(sys.argv[1]), tuple(sys.argv[2:]))
