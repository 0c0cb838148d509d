"""What importing this package adds to loading and saving models with transformers.

transformers leaves out what it does not know in a file and fills in random weights; and it writes
`config.json` first, then weights over those that were there. So a model is refused that is INT8 and
whose `config.json` does not say so, and a folder with an INT8 model has it or the next one, whole.
Both are methods of `PreTrainedModel`, wrapped here: nothing else is called for every model.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .drafts import drafted
from .quantizer import QFTQuantizer, int8_weights, refuse_int8
from .tensor_files import tensor_names
from .wrapping import wrap_


def install_guards() -> None:
    """Wrap loading and saving. Idempotent."""
    wrap_(PreTrainedModel, "_load_pretrained_model", _refusing_int8)
    wrap_(PreTrainedModel, "save_pretrained", _writing_whole)


def _refusing_int8(load: Any) -> Any:
    def guarded(
        model: Any, state_dict: Any, files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        if not isinstance(load_config.hf_quantizer, QFTQuantizer):  # it looks itself
            refuse_int8(state_dict or tensor_names(files or []), of=model.name_or_path)
        return load(model, state_dict, files, load_config, *args)

    return guarded


def _writing_whole(save: Any) -> Any:
    def guarded(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        is_int8 = isinstance(getattr(self, "hf_quantizer", None), QFTQuantizer)
        # A push reads the folder while it saves, and names the repository after it.
        if kwargs.get("push_to_hub") or not (is_int8 or _holds_int8(folder)):
            save(self, save_directory, *args, **kwargs)
            return
        with drafted(folder) as draft:
            save(self, draft, *args, **kwargs)

    return guarded


def _holds_int8(folder: Path) -> bool:
    try:
        return bool(
            int8_weights(tensor_names([str(file) for file in folder.glob("*.safetensors")]))
        )
    except ValueError:  # damaged: it is to be replaced
        return True
