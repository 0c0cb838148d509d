"""How a method of transformers or Accelerate is wrapped, where nothing else gives a way in.

Importing `qft_hf.hf` does so: see what `hf/__init__.py` installs.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

MARK = "_qft_wrappers"


def wrap_(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put what `wrapper` makes of a method in its place; a second time nothing happens.

    Args:
        owner: The class or module that has it, modified.
        name: Of the method, which may be static.
        wrapper: Takes the method, and returns a function with the same arguments.
    """
    method = getattr(owner, name)
    known = getattr(method, MARK, ())
    if wrapper.__qualname__ in known:
        return
    wrapped: Any = wraps(method)(wrapper(method))
    setattr(wrapped, MARK, (*known, wrapper.__qualname__))
    is_static = isinstance(vars(owner)[name], staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)
