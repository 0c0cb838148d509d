"""Estimate the memory of full-parameter INT8 training by arithmetic: the same as `qft-hf plan`."""

import sys

from qft_hf_cli import plan, run

if __name__ == "__main__":
    run(plan, sys.argv[1:])
