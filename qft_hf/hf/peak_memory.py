"""Peak memory of a run, on the device of its model."""

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The largest amount of memory that a run held at one time, and the kind of memory."""

    bytes: int
    what: str  # "CUDA memory allocated" or "resident memory of the process"

    @classmethod
    def measured(cls, device: torch.device) -> "PeakMemory":
        """Return the peak since the process began, on the device of the model."""
        if device.type == "cuda":
            return cls(torch.cuda.max_memory_allocated(device), "CUDA memory allocated")
        import resource  # Unix only, as is training on a CPU

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if platform.system() == "Darwin" else 1024  # bytes on macOS, KiB on Linux
        return cls(peak * unit, "resident memory of the process")
