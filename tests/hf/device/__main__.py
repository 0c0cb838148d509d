"""Run everything on the CPU and on the device, and save the results.

python -m tests.hf.device FILE [NAME ...]
"""

import gc
import sys
import traceback
from typing import Any

import torch

from tests.hf.device.absent import CPU, DEVICE
from tests.hf.device.scenarios import RUNS

if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # each run ends with a garbage collection, which need not visit imported objects
    found: dict[str, Any] = {}
    for name in sys.argv[2:] or RUNS:
        run = RUNS[name]
        found[name] = {"cpu": run(CPU)}
        try:
            found[name]["device"] = run(DEVICE)
        except Exception:  # noqa: BLE001 a test reports any error
            found[name]["error"] = traceback.format_exc()
    torch.save(found, sys.argv[1])
