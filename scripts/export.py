"""Write the model of an INT8 checkpoint as an ordinary checkpoint: the same as `qft-hf export`."""

import sys

from qft_hf_cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
