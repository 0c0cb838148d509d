"""The most memory that a run held at one time, where its model is."""

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The most memory a run held at one time."""

    bytes: int
    what: str  # "CUDA memory allocated" or "resident memory of the process"

    @classmethod
    def measured(cls, device: torch.device) -> "PeakMemory":
        """Measure since the process began, where the model is."""
        if device.type == "cuda":
            return cls(torch.cuda.max_memory_allocated(device), "CUDA memory allocated")
        import resource  # Unix only, as is training on a CPU here

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB on Linux
        return cls(peak * unit, "resident memory of the process")
