"""Largest magnitudes of columns: PyTorch has a kernel for that on GPUs."""

from ..reference.column_absmax import column_absmax

__all__ = ["column_absmax"]
