"""The quantized optimizer."""

from .lion import QFTLion

__all__ = ["QFTLion"]
