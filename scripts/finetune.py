"""Fine-tune every parameter of a model in INT8.

    python scripts/finetune.py configs/demo.yaml
    python scripts/finetune.py configs/demo.yaml --learning_rate 5e-5 --output_dir runs/second
    accelerate launch scripts/finetune.py configs/demo.yaml

A config is a flat YAML file; its keys are the flags that `--help` lists, and flags override it.
"""

import sys

from qft_hf.hf.finetune import finetune, parse_arguments


def main() -> None:
    """Do one run as the command line says, and print what it came to."""
    arguments = parse_arguments(sys.argv[1:], description=__doc__)
    summary = finetune(arguments)
    if arguments.training.process_index == 0:
        print(f"\n{summary}\n{'written to':<30}{arguments.training.output_dir}")


if __name__ == "__main__":
    main()
