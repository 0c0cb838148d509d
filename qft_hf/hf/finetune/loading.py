"""Loads the tokenizer and the model of a run, and checks that they fit the data."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...side import trained_heads
from ..checkpoint import weight_files
from ..language_model import freeze_non_text_parts
from ..loading_faults import refuse_damage
from ..missing_model import explain_loading_errors
from ..positions import n_positions
from ..shipped import shipped_file, shipped_names
from ..side_network import is_side_network
from ..tensor_files import DAMAGED, tensor_names
from ..wording import and_more
from .arguments import ModelArguments
from .task import Task

logger = logging.getLogger(__name__)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer; set a padding token and, if asked for, new tokens and a chat template.

    Raises:
        FileNotFoundError: The model or the template file does not exist.
        ValueError: The tokenizer has neither a padding token nor an end-of-text token to pad with.
    """
    tokenizer = read_tokenizer(
        arguments.tokenizer_name_or_path or arguments.model_name_or_path,
        advice=" If its tokenizer is another model's, set tokenizer_name_or_path to that.",
        revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.new_tokens:
        tokenizer.add_tokens(arguments.new_tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has neither pad_token nor eos_token, "
                "so batches cannot be padded. Set pad_token in its tokenizer_config.json."
            )
        # Padding is masked by position, so the end-of-text token of a text is still learned.
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.chat_template is not None:
        template = Path(arguments.chat_template)
        if not template.is_file():
            template = shipped_file(arguments.chat_template, ".jinja") or template
        if not template.is_file():
            raise FileNotFoundError(
                f"no chat template {template} (looked from {Path.cwd()}). Set chat_template to a "
                f"Jinja file, or to one that ships: {', '.join(shipped_names('.jinja'))}."
            )
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{template} is not in UTF-8. Save it as UTF-8.") from error
    return tokenizer


def read_tokenizer(name: str | Path, *, advice: str = "", **loading: Any) -> Any:
    """Return the tokenizer of a model as it is stored, loaded with these arguments.

    Args:
        name: Folder, or name on the hub.
        advice: Appended to the error if the tokenizer cannot be loaded.
        **loading: Arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: The model does not exist.
        ValueError: The tokenizer cannot be loaded.
    """
    if is_side_network(Path(name)) and not Path(name, "tokenizer_config.json").is_file():
        raise ValueError(
            f"{name} holds a side network and no tokenizer. Save that of its base there, too, with "
            f"save_pretrained({str(name)!r}).{advice}"
        )
    with explain_loading_errors(name, advice=advice):
        try:
            return AutoTokenizer.from_pretrained(name, **loading)
        except Exception as error:  # damaged files cause a KeyError, a bare Exception, and others
            is_said = isinstance(error, ImportError | OSError | ValueError)
            if is_said and not isinstance(error, json.JSONDecodeError):
                raise
            raise ValueError(
                f"its tokenizer cannot be read ({type(error).__name__}: {error}). {DAMAGED}"
            ) from error


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load the configuration of the model.

    Raises:
        FileNotFoundError: The model does not exist.
    """
    with explain_loading_errors(arguments.model_name_or_path):
        return AutoConfig.from_pretrained(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )


def load_model(
    arguments: ModelArguments,
    quantization: Any,
    config: PreTrainedConfig,
    task: Task,
    *,
    frozen: bool = False,
) -> PreTrainedModel:
    """Load a model with quantized weights: a float checkpoint is quantized tensor by tensor.

    A checkpoint that is quantized already keeps its format.

    Args:
        arguments: Which model.
        quantization: Format of the weights, as `from_pretrained` takes it; None: a float checkpoint
            stays float.
        config: Configuration of the model; the task's head is written into it.
        task: Determines the class of the model and its head.
        frozen: Whether only the head of the model is trained and saved.

    Raises:
        ValueError: The model has too few positions for the examples or too few embeddings for the
            tokens; or it is frozen, and frozen weights are missing from the checkpoint.
    """
    check_fit(config, arguments, task)
    task.configure(config)
    is_quantized = getattr(config, "quantization_config", None) is not None
    with explain_loading_errors(arguments.model_name_or_path):
        model, found = task.model_class(config).from_pretrained(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            config=config,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation=arguments.attn_implementation,
            quantization_config=None if is_quantized else quantization,
            output_loading_info=True,
        )
    freeze_non_text_parts(model, config)
    heads = tuple(f"{name}." for name in trained_heads(model)) if frozen else ("",)  # all
    if random := sorted(name for name in found["missing_keys"] if not name.startswith(heads)):
        raise ValueError(
            f"{arguments.model_name_or_path} has no {and_more(random)}. A side network is trained "
            "and saved without these weights, so they would stay random. Set method to full, which "
            "trains them, or start from a checkpoint that has them."
        )
    if len(task.tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(task.tokenizer))
    # A classifier looks for the last token that is not padding, also before training begins. If it
    # were set before the model is created, this token's embedding would not be learned.
    model.config.get_text_config().pad_token_id = task.tokenizer.pad_token_id
    if model.can_generate():
        _stop_at_end(model, task)
    return model


def check_fit(config: PreTrainedConfig, arguments: ModelArguments, task: Task) -> None:
    """Raise ValueError if a model has too few positions for the examples, or embeddings."""
    max_length, n_tokens = task.arguments.max_length, len(task.tokenizer)
    n_embeddings, positions = config.get_text_config().vocab_size, n_positions(config)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length is {max_length}, but the model has {positions} positions. Set max_length "
            f"to {positions} or less."
        )
    if n_tokens > n_embeddings and not arguments.new_tokens:
        raise ValueError(
            f"the tokenizer knows {n_tokens} tokens, but the model has {n_embeddings} "
            "embeddings. Use the model's own tokenizer, and list additional tokens in new_tokens."
        )


def require_weights(folder: Path) -> None:
    """Raise ValueError unless a folder has the weights that loading needs, as they were saved.

    Weights that have check sums are read, to compare them.
    """
    if any(folder.glob("pytorch_model*.bin")):
        return  # pickled weights: only loading can check them
    with explain_loading_errors(folder):
        files = [str(folder / name) for name in weight_files(folder)]
        tensor_names(files)
        refuse_damage(files)


def _stop_at_end(model: PreTrainedModel, task: Task) -> None:
    """Make generation stop at the token with which the model learns to end an answer or text."""
    settings: Any = model.generation_config
    stops = settings.eos_token_id
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    if task.end_token is None:
        logger.warning(
            "the chat template does not end answers with a special token of the tokenizer, so "
            "generation will not stop there. If the template has an end token, add it with "
            "new_tokens; or use a template that ends answers with %s.",
            task.tokenizer.eos_token,
        )
    elif task.end_token not in [*stops, task.tokenizer.eos_token_id]:
        settings.eos_token_id = [*stops, task.end_token]
        logger.warning(
            "the model learns to end its texts with %s, so generation now stops there, and not "
            "only at %s: see generation_config.json.",
            task.tokenizer.decode([task.end_token]),
            task.tokenizer.eos_token,
        )
