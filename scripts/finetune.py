"""Fine-tune every parameter in INT8: `qft-hf finetune` as a file, for launchers that need one.

accelerate launch scripts/finetune.py demo
"""

import sys

from qft_hf_cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
