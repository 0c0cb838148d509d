"""Settings that every test shares, made before torch or transformers is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched at test time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way
