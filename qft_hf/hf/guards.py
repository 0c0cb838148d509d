"""Guards that importing this package adds to loading and saving models with transformers.

transformers ignores tensors in a file that it does not know, and fills in random weights. It writes
`config.json` first, and then overwrites earlier weights. Therefore loading refuses an INT8 model
whose `config.json` does not declare it, and saving into a folder with an INT8 model replaces all of
it or nothing. Both wrap methods of `PreTrainedModel`: nothing else is called for every model.

Some models set the padding row of their embedding to zero at the end of loading, even if the row
was in the checkpoint. A row of an INT8 weight stays as it was loaded.

Other functions look for parameters by names that INT8 weights do not have: Accelerate's loading,
those of safetensors and huggingface_hub, the stock Trainer's loading of a checkpoint, and that of
an adapter with whole modules by PEFT or transformers. They raise an error where they would leave a
model as it was built, and the Trainer's warning about missing weights takes tied ones into account.
"""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..nn import QuantizedModule, weight_of
from ..quant import View
from .atomic_writes import atomic_folder
from .compatibility import has_quantized_weights
from .loading_faults import int8_weights, refuse_int8
from .optimizers import named_optimizer
from .quantizer import QFTQuantizer
from .saved_model import prepared_for_saving
from .saved_names import saved_names_accepted
from .tensor_files import memory, tensor_names
from .wording import and_more


def refusing_int8(
    load: Any,
    model: Any,
    state_dict: Any,
    checkpoint_files: list[str] | None,
    load_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Make loading refuse INT8 weights whose `config.json` does not declare them."""
    # Loading a model passes these arguments by position, and loading an adapter by name.
    arguments = (model, state_dict, checkpoint_files, load_config, *args)
    is_adapter = getattr(model, "_hf_peft_config_loaded", False)
    if isinstance(load_config.hf_quantizer, QFTQuantizer) and not is_adapter:  # it checks the files
        return load(*arguments, **kwargs)
    names = list(state_dict or tensor_names(checkpoint_files or []))
    if is_adapter:
        refuse_other_form(model, names)
        if found := int8_weights(names):
            raise ValueError(
                f"The adapter has INT8 weights, {and_more(found)}, such as embeddings that were "
                "resized, and transformers finds no parameters for them. Load it with "
                "peft.PeftModel.from_pretrained(model, folder)."
            )
        return load(*arguments, **kwargs)
    refuse_int8(names, of=model.name_or_path)
    loaded = load(*arguments, **kwargs)
    # In pickled files, names of tensors are not known before they are read.
    refuse_int8(loaded[0].unexpected_keys, of=model.name_or_path)
    return loaded


# What PEFT's wrappers add to the name of a module.
_ADDED = re.compile(r"^base_model\.model\.|\.(original_module|modules_to_save\.[^.]+)(?=\.|$)")


def check_adapter_load(
    load: Any, model: nn.Module, peft_model_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Make PEFT refuse an adapter with whole modules in another form than those of the model."""
    refuse_other_form(model, peft_model_state_dict)
    return load(model, peft_model_state_dict, *args, **kwargs)


def refuse_other_form(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if an adapter has INT8 weights of float modules, or the other way around.

    Adapters hold whole modules if these are in `modules_to_save`, and embeddings that were resized
    or that are adapted.

    Args:
        model: The model with the adapter's modules, without its values.
        names: Names of tensors in the adapter.
    """
    int8 = {
        _ADDED.sub("", f"{name}.{own}")
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for own in type(module).weight_names
    }
    names = [_ADDED.sub("", name) for name in names]
    if floats := sorted(int8.intersection(names)):
        raise ValueError(
            f"The adapter has float weights, {and_more(floats)}, and these are INT8 in the model: "
            "PEFT saves modules_to_save and resized embeddings with an adapter. Load it onto a "
            "model in which they are float: list them in modules_to_not_convert of the QFTConfig, "
            "or call dequantize_model_ before you add the adapter."
        )
    if found := [name for name in int8_weights(names) if weight_of(name) not in int8]:
        raise ValueError(
            f"The adapter has INT8 weights, {and_more(found)}, and the model has float ones there, "
            "which it would keep: PEFT saves resized embeddings with an adapter. Load it onto the "
            "INT8 model that it was trained on; dequantize_model_ then makes both float."
        )


def leaving_int8_rows(zero: Any, tensor: Tensor) -> Tensor:
    """Make initialization leave rows of INT8 weights, which have no memory of their own."""
    return tensor if isinstance(tensor, View) else zero(tensor)


def warning_except_tied(warn: Any, self: Any, load_result: Any) -> None:
    """Make the stock Trainer refuse INT8 weights that it would ignore, and miss no tied weights."""
    found = int8_weights(load_result.unexpected_keys)
    if found and named_optimizer(self.args) is None:  # ours raise for a float model
        raise ValueError(
            f"The checkpoint has INT8 weights, {and_more(found)}, and the Trainer would ignore "
            f"them and keep the weights that {type(self.model).__name__} has. Set the "
            "optim=... that the checkpoint was trained with, or load the model from it with "
            "from_pretrained and call dequantize_model_ to train float weights from there."
        )
    missing = load_result.missing_keys
    state = self.model.state_dict() if missing and has_quantized_weights(self.model) else {}
    loaded = {memory(tensor) for name, tensor in state.items() if name not in missing}
    # A tied weight is saved once, under the first of its names.
    missing = [name for name in missing if memory(state.get(name)) not in loaded]
    warn(self, load_result._replace(missing_keys=missing))


def check_accelerate_load(
    load: Any, model: nn.Module, checkpoint: Any, device_map: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Make loading by names of parameters refuse INT8 weights, and a state find its names."""
    is_int8 = has_quantized_weights(model)
    if device_map is not None or not is_int8:
        refuse_by_name(Path(checkpoint), is_int8=is_int8)
    with saved_names_accepted(model):
        return load(model, checkpoint, device_map, *args, **kwargs)


def check_safetensors_load(
    load: Any, model: nn.Module, filename: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make loading INT8 weights into a float model raise; `PyTorchModelHubMixin` is not strict."""
    _refuse_in_float(model, Path(filename))
    return load(model, filename, *args, **kwargs)


def check_hub_load(
    load: Any, model: nn.Module, checkpoint_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make loading INT8 weights into a float model raise; by default the Hub is not strict."""
    _refuse_in_float(model, Path(checkpoint_path))
    return load(model, checkpoint_path, *args, **kwargs)


def _refuse_in_float(model: nn.Module, path: Path) -> None:
    """Raise ValueError if a file, or one in a folder, has INT8 weights, and a model has none."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    if (found := int8_weights(tensor_names(files))) and not has_quantized_weights(model):
        raise ValueError(
            f"{path} has INT8 weights, {and_more(found)}, and {type(model).__name__} is float and "
            "would keep its initial values. Call quantize_model_(model, QFTConfig(...)) with the "
            "configuration of the saved model first."
        )


def refuse_by_name(checkpoint: Path, *, is_int8: bool) -> None:
    """Raise ValueError if a checkpoint that Accelerate is to load has INT8 weights."""
    folder = checkpoint.parent if checkpoint.suffix == ".json" else checkpoint
    files = [checkpoint] if checkpoint.suffix == ".safetensors" else folder.glob("*.safetensors")
    if found := int8_weights(tensor_names(files)):
        happens = (
            "finds no parameters for them with a device_map"
            if is_int8
            else "would leave this float model with its initial values"
        )
        raise ValueError(
            f"{checkpoint} has INT8 weights, {and_more(found)}, and Accelerate, which loads "
            f"parameters by their names, {happens}. Load it with from_pretrained of the model's "
            'class, with device_map={"": device} for a device of your choice.'
        )


def writing_whole(save: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Make saving replace an INT8 model in a folder as a whole."""
    folder = Path(save_directory)
    given = inspect.signature(save).bind(self, save_directory, *args, **kwargs).arguments
    model = prepared_for_saving(self, given.get("state_dict"))
    is_int8 = isinstance(getattr(model, "hf_quantizer", None), QFTQuantizer)
    # With `push_to_hub`, saving also reads the folder, and names the repository after it.
    if given.get("push_to_hub") or not (is_int8 or _holds_int8(folder)):
        save(model, save_directory, *args, **kwargs)
        return
    with atomic_folder(folder) as draft:
        save(model, draft, *args, **kwargs)


def _holds_int8(folder: Path) -> bool:
    try:
        return bool(int8_weights(tensor_names(folder.glob("*.safetensors"))))
    except ValueError:  # a damaged file may be INT8
        return True
