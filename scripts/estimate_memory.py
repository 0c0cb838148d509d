"""Estimate the memory of full-parameter INT8 training by arithmetic: the same as `qft-hf plan`."""

import sys

from qft_hf_cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
