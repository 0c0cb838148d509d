"""Where tests of the Triton kernels run: on a GPU, in Triton's interpreter, or on emulated PTX.

The last two must be chosen before kernels are imported, so each needs a process of its own:
`TRITON_INTERPRET=1`, or `QFT_PTX=86` for a GPU of compute capability 8.6.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("QFT_PTX")
DEVICE = torch.device("cpu" if INTERPRETED or EMULATED else "cuda")

# The mark deselects tests on machines without a GPU, so it is set only if a GPU is needed.
MARKS = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, TRITON_INTERPRET=1 or QFT_PTX=86", allow_module_level=True)
pytest.importorskip("triton")
if EMULATED:
    from tests.ptx.driver import install

    install(int(EMULATED))


def capability() -> tuple[int, int]:
    """Return the compute capability of the GPU, real or emulated."""
    if EMULATED:
        return divmod(int(EMULATED), 10)
    return torch.cuda.get_device_capability()
