"""Where tests of the Triton kernels run: on a GPU, in Triton's interpreter, or on emulated PTX.

The last two are chosen before kernels are imported, so each takes a process of its own:
`TRITON_INTERPRET=1`, or `QFT_PTX=86` for a GPU of compute capability 8.6.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("QFT_PTX")
DEVICE = torch.device("cpu" if INTERPRETED or EMULATED else "cuda")

# Where no GPU is needed the mark would deselect the tests.
MARKS = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, TRITON_INTERPRET=1 or QFT_PTX=86", allow_module_level=True)
pytest.importorskip("triton")
if EMULATED:
    from tests.ptx.driver import install

    install(int(EMULATED))


def capability() -> tuple[int, int]:
    """Of the GPU, there or emulated."""
    if EMULATED:
        return divmod(int(EMULATED), 10)
    return torch.cuda.get_device_capability()
