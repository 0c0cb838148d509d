"""Memory of a run: measured from live tensors, and predicted before anything is loaded."""

from .estimate import MemoryEstimate, Workload, estimate
from .ledger import LedgerRow, MemoryLedger, memory_ledger
from .side import Base, estimate_side

__all__ = [
    "Base",
    "LedgerRow",
    "MemoryEstimate",
    "MemoryLedger",
    "Workload",
    "estimate",
    "estimate_side",
    "memory_ledger",
]
