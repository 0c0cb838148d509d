"""Fine-tune every parameter of a model in INT8: `qft-hf finetune`, for launchers that want a file.

accelerate launch scripts/finetune.py demo
"""

import sys

from qft_hf_cli import finetune, run

if __name__ == "__main__":
    run(finetune, sys.argv[1:])
