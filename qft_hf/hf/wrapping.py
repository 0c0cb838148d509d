"""Wraps methods of transformers and Accelerate that offer no other way to extend them.

Importing `qft_hf.hf` installs the wrappers: see `hf/__init__.py`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

MARK = "_qft_wrappers"


def wrap_(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method by `wrapper(method)`; a second call with the same wrapper does nothing.

    Args:
        owner: Class or module that has the method. Modified.
        name: Name of the method, which may be static.
        wrapper: Function that takes the method and returns one with the same arguments.
    """
    method = getattr(owner, name)
    known = getattr(method, MARK, ())
    if wrapper.__qualname__ in known:
        return
    wrapped: Any = wraps(method)(wrapper(method))
    setattr(wrapped, MARK, (*known, wrapper.__qualname__))
    is_static = isinstance(vars(owner)[name], staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)
