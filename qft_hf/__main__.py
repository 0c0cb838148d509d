"""`python -m qft_hf`: the command `qft-hf`, for `accelerate launch -m qft_hf` and the like."""

from qft_hf_cli import main

if __name__ == "__main__":
    main()
