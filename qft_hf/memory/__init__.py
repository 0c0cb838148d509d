"""Where the bytes are: measured from live tensors, and predicted before anything is loaded."""

from .estimate import MemoryEstimate, Workload, estimate
from .ledger import LedgerRow, MemoryLedger, memory_ledger

__all__ = [
    "LedgerRow",
    "MemoryEstimate",
    "MemoryLedger",
    "Workload",
    "estimate",
    "memory_ledger",
]
