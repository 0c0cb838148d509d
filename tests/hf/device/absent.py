"""A device other than the CPU, on a machine that has none.

A tensor on it holds a CPU tensor, with which operators compute, so a run there has the bits of the
same run on the CPU. As on a GPU, an operator refuses tensors of two devices, and an operation that
passes a value to the host makes the host wait, which is recorded in `waits`. PyTorch reserves a
device for backends in Python (`torch.utils.backend_registration`); a process cannot remove it.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    """`torch.absent`, with the random numbers of the CPU."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("absent", backend_module=_Module())

DEVICE = torch.device("absent", 0)
aten = torch.ops.aten
CPU = torch.device("cpu")

LOOKS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Wait(NamedTuple):
    """A wait of the host for a value: the operator that needs it, and the module that calls it."""

    operator: str
    module: str


waits: list[Wait] = []


class Absent(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "Absent":
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operator, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("A tensor on a device cannot become an array: use .cpu() first.")
        _note("numpy")
        return self.held.numpy(force=True)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Absent({self.held})"


def held(tensor: Any) -> Any:
    """Return the CPU tensor that a tensor on the device holds, and anything else as it is."""
    return tensor.held if isinstance(tensor, Absent) else tensor


def _note(operator: str) -> None:
    frame = sys._getframe(1)
    while (
        frame.f_globals["__name__"].split(".")[0] == "torch" or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back  # type: ignore[assignment]
    waits.append(Wait(operator, frame.f_globals["__name__"]))


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Absent)]
    packet, target = operator.overloadpacket, kwargs.get("device")
    is_copy = packet is aten.copy_
    # Indices and zero-dimensional tensors may be on the host.
    together = (args[0], *args[2:]) if packet in INDEXING else (args, kwargs)
    members = [t for t in tree_leaves(together) if isinstance(t, Tensor) and t.ndim]
    if not is_copy and len({isinstance(t, Absent) for t in members}) > 1:
        raise RuntimeError(f"{operator} has tensors of two devices: {tensors}")
    stays = _is_here(target) or (bool(ours) and target is None)
    if is_copy:
        stays = isinstance(args[0], Absent)
    if ours and (operator in LOOKS or not stays):
        _note(str(operator))
    owners = {id(tensor.held): tensor for tensor in ours}
    args, kwargs = tree_map_only(Absent, held, (args, kwargs))
    if target is not None:
        kwargs["device"] = CPU if _is_here(target) else target
    kwargs.pop("pin_memory", None)

    def outer(result: Tensor) -> Tensor:
        owner = owners.get(id(result))  # a tensor that is changed in place stays the same object
        return owner if owner is not None else Absent(result) if stays else result

    return tree_map_only(Tensor, outer, operator(*args, **kwargs))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, Absent):
        _note("copy to the host")
    held(target).copy_(held(source))
    return target


_kernels = torch.library.Library("aten", "IMPL")
for _make in (aten.empty.memory_format, aten.empty_strided.default):
    _kernels.impl(
        _make, lambda *args, _make=_make, **kwargs: _run(_make, args, kwargs), "PrivateUse1"
    )
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
