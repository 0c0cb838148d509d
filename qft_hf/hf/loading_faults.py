"""Checks whether a checkpoint can be loaded as an INT8 model: its files, tensors and devices."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..nn import weight_of
from ..nn.state import state_names
from ..optim.processes import SEVERAL_GPUS, Processes
from .tensor_files import DAMAGED, damaged, tensor_names
from .wording import and_more, counted

FAULTS_SHOWN = 10  # lines of an error that may concern every tensor of a model


def check_files(files: list[str], *, pre_quantized: bool) -> None:
    """Raise ValueError for faults visible before loading: in names, headers and check sums.

    Args:
        files: Paths of the files of one checkpoint.
        pre_quantized: Whether its configuration says that its weights are INT8.
    """
    folder = Path(files[0]).parent if files else Path()
    if pre_quantized and files == [str(folder / SAFE_WEIGHTS_NAME)]:
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            raise ValueError(
                f"{folder} has {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}: two models, "
                "one from an earlier run. Remove the one that you do not need."
            )
    names = set(tensor_names(files))
    if not pre_quantized:
        refuse_int8(names, of=str(folder))
    doubled = [name for name in names if weight_of(name) in names]
    if doubled:
        raise ValueError(
            f"{min(doubled)} is in {files[0]} next to a float weight of the same module (one of "
            f"{len(doubled)} such fields), so the checkpoint is a mixture of two. Save the "
            "model again into an empty folder."
        )
    if pre_quantized:
        refuse_damage(files)


def refuse_damage(files: list[str]) -> None:
    """Raise ValueError for tensors that do not have their check sums; reads all of them.

    Args:
        files: Paths of the files of one checkpoint.
    """
    if found := damaged(files):
        shown = "\n".join(f"- {fault}" for fault in found[:FAULTS_SHOWN])
        folder = Path(files[0]).parent
        raise ValueError(
            f"{folder} has faults in {counted(len(found), 'tensor')}, of which at most "
            f"{FAULTS_SHOWN} are listed:\n{shown}\n{DAMAGED} QFT_CHECKSUMS=0 loads it unchecked."
        )


def int8_weights(names: Iterable[str]) -> list[str]:
    """Return the names that are codes of an INT8 weight, whose scales are among `names` too."""
    names = set(names)
    fields = [state_names(weight) for weight in {weight_of(name) for name in names} if weight]
    return sorted(of["codes"] for of in fields if {of["codes"], of["scales"]} <= names)


def refuse_int8(names: Iterable[str], *, of: str) -> None:
    """Raise ValueError if a checkpoint without a quantization_config has INT8 weights.

    transformers would ignore them and continue with random weights.

    Args:
        names: Names of the tensors in the checkpoint.
        of: Path of the checkpoint, for the error.
    """
    if found := int8_weights(names):
        raise ValueError(
            f"{of} has INT8 weights, {and_more(found)}, and its config.json has "
            "no quantization_config of qft_hf. Restore the config.json that was saved with them, "
            "and pass no quantization_config."
        )


def check_finite(name: str, parameter: Tensor) -> None:
    """Raise ValueError if a float parameter has NaN or infinite values."""
    finite = parameter.detach().isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name} has {int((~finite).sum())} of {finite.numel()} values that are NaN or "
            "infinite. The checkpoint is damaged or its dtype too narrow: load a good one."
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor of a checkpoint has another shape than the model needs."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, and the model needs "
            f"{tuple(shape)}. Load it with its own config.json; to change a size, load it as float "
            "with ignore_mismatched_sizes=True and call quantize_model_."
        )


def refuse_shards(skeleton: PreTrainedModel) -> None:
    """Raise ValueError for a `distributed_config`, by which transformers divides a model."""
    is_sharded = getattr(skeleton.config, "distributed_config", None) is not None
    if is_sharded and Processes.found() is not None:
        raise ValueError(
            "distributed_config splits weights among processes as float tensors, by rows or "
            "columns, and INT8 weights cannot be split that way. Load the model without it. "
            + SEVERAL_GPUS
        )


def refuse_several_devices(skeleton: PreTrainedModel, device_map: Any) -> None:
    """Raise ValueError for a model with tied weights on several devices.

    Accelerate, which moves inputs between devices, recognizes tied weights by equal addresses. The
    address of every INT8 weight is 0, so it would replace all of them by one.
    """
    places = device_map.values() if isinstance(device_map, dict) else ()
    devices = sorted({str(device) for device in places})
    if len(devices) > 1 and skeleton.all_tied_weights_keys:
        raise ValueError(
            f"{next(iter(skeleton.all_tied_weights_keys))} is tied to another weight, and an INT8 "
            f"model with tied weights cannot be split over several devices, got {devices}. Use one "
            'device, such as device_map={"": 0}.'
        )
