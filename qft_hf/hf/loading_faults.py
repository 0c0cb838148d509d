"""Why a checkpoint cannot be loaded as an INT8 model: files, tensors, and where they are to lie."""

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

FAULTS_SHOWN = 10  # of an error that may concern every tensor of a model


def check_files(files: list[str], *, pre_quantized: bool) -> None:
    """Raise for what shows before anything is loaded: names of files, and their headers.

    Args:
        files: Of one checkpoint.
        pre_quantized: Whether its weights are said to be INT8.

    Raises:
        ValueError: Names the file, and the first tensor that is at fault.
    """
    folder = Path(files[0]).parent if files else Path()
    if pre_quantized and files == [str(folder / SAFE_WEIGHTS_NAME)]:
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            raise ValueError(
                f"{folder} has {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}: two models, "
                "one of an earlier run. Remove the one that is not wanted."
            )
    names = set(tensor_names(files))
    if not pre_quantized:
        refuse_int8(names, of=str(folder))
    doubled = [name for name in names if weight_of(name) in names]
    if doubled:
        raise ValueError(
            f"{min(doubled)} is in {files[0]} beside a float weight of the same module, one of "
            f"{len(doubled)} such fields, so the checkpoint is a mixture of two. Save the "
            "model again into an empty folder."
        )
    if pre_quantized and (found := damaged(files)):
        shown = "\n".join(f"- {fault}" for fault in found[:FAULTS_SHOWN])
        raise ValueError(
            f"at fault in {folder}: {counted(len(found), 'tensor')}, the first {FAULTS_SHOWN} "
            f"at most:\n{shown}\n{DAMAGED} QFT_CHECKSUMS=0 loads them as they are."
        )


def int8_weights(names: Iterable[str]) -> list[str]:
    """Of names of tensors, those that are codes of an INT8 weight: its scales are there too."""
    names = set(names)
    fields = [state_names(weight) for weight in {weight_of(name) for name in names} if weight]
    return sorted(of["codes"] for of in fields if {of["codes"], of["scales"]} <= names)


def refuse_int8(names: Iterable[str], *, of: str) -> None:
    """Raise if a checkpoint without a quantization_config has INT8 weights.

    transformers would leave them out and go on with random ones.

    Args:
        names: Of the tensors in the checkpoint.
        of: Where it is, for the error.

    Raises:
        ValueError: So it is; the text names one of them.
    """
    if found := int8_weights(names):
        raise ValueError(
            f"{of} has INT8 weights, {and_more(found)}, and its config.json has "
            "no quantization_config of qft_hf. Restore the config.json that was saved with them, "
            "and leave out what you pass as quantization_config."
        )


def check_finite(name: str, parameter: Tensor) -> None:
    """Raise if a float parameter has values that no training can start from.

    Raises:
        ValueError: Some are NaN or infinite.
    """
    finite = parameter.detach().isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name} has {int((~finite).sum())} of {finite.numel()} values that are NaN or "
            "infinite. The checkpoint is damaged or its dtype too narrow: load a good one."
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise if a tensor of a checkpoint has another shape than the model needs.

    Raises:
        ValueError: It has.
    """
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, and the model needs "
            f"{tuple(shape)}. Load it with its own config.json; to change a size, load it as float "
            "with ignore_mismatched_sizes=True and call quantize_model_."
        )


def refuse_shards(skeleton: PreTrainedModel) -> None:
    """Refuse what transformers does with a `distributed_config`: tensor parallelism and FSDP2.

    Raises:
        ValueError: There is one, and several processes.
    """
    is_sharded = getattr(skeleton.config, "distributed_config", None) is not None
    if is_sharded and Processes.found() is not None:
        raise ValueError(
            "distributed_config splits weights among processes as float tensors, by rows or "
            "columns, and INT8 weights cannot be held so. Load the model without it. "
            + SEVERAL_GPUS
        )


def refuse_several_devices(skeleton: PreTrainedModel, device_map: Any) -> None:
    """Refuse a tied model on several devices.

    Accelerate, which moves its inputs between them, tells tied weights by their addresses. Those of
    all INT8 weights are 0, and it would put one of them in the place of all.

    Raises:
        ValueError: The model has tied weights, and the map several devices.
    """
    places = device_map.values() if isinstance(device_map, dict) else ()
    devices = sorted({str(device) for device in places})
    if len(devices) > 1 and skeleton.all_tied_weights_keys:
        raise ValueError(
            f"{next(iter(skeleton.all_tied_weights_keys))} is tied to another weight, and an INT8 "
            f"model with tied weights cannot lie on several devices, here {devices}. Use one, "
            'such as device_map={"": 0}.'
        )
