"""Causal language models: which class loads one, and which parts are outside the text decoder."""

import inspect
import logging
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

logger = logging.getLogger(__name__)

# Families whose loss compares the output at a token with that token, which the model has read.
_UNSHIFTED = ("cpmant", "trocr", "whisper", "xlm", "xlnet")
# Families that fail without an image or its processor's inputs, which their signatures do not say.
_NEED_IMAGES = ("git", "idefics", "kosmos-2", "molmo2")
# Families of text whose configurations have sections that are not parts of other kinds.
_SECTIONED = ("blt", "dbrx", "mpt")


def language_class(config: Any) -> Any:
    """Return the auto class of transformers that makes and loads a causal language model.

    This includes models that also take images: without an image, they train on text alone.

    Args:
        config: Configuration of the model.

    Raises:
        ValueError: The configuration does not belong to a causal language model, or to one that
            would see the tokens that it has to predict, or that needs an image with each text.
    """
    advice = "In Python, QFTTrainer trains other models, and qft_hf.memory_ledger measures them."
    if config.is_encoder_decoder:
        raise ValueError(
            f"A causal language model is needed, and the model of {type(config).__name__} has an "
            f"encoder, which would read the answers that its decoder should learn. {advice}"
        )
    remote_code = getattr(config, "auto_map", None) or {}
    for auto, known in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known or auto.__name__ in remote_code:
            if type(config) in known:
                _refuse_copying(config)
                _refuse_images(known[type(config)], config)
            return auto
    raise ValueError(
        f"A causal language model is needed, and {type(config).__name__} belongs to none that "
        f"transformers knows. {advice}"
    )


def _refuse_copying(config: PreTrainedConfig) -> None:
    """Raise for a family that would learn to copy: it sees the tokens that it has to predict."""
    is_half = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and (
        hasattr(config, "is_decoder")  # Bart and its like; a decoder of its own has none
    )
    if is_half or config.model_type in _UNSHIFTED:
        raise ValueError(
            f"A causal language model is needed, and the loss of the model of "
            f"{type(config).__name__} compares its output at each token with that token, not with "
            "the next one, so it would learn to copy. Train it in Python, with QFTTrainer and "
            "labels that are moved by one token."
        )
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or (
        config.model_type == "bert-generation"
    )
    if is_encoder and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"A causal language model is needed, and the model of {type(config).__name__} is an "
            "encoder: each token sees the ones after it, which it would have to predict. Train it "
            "as a classifier (task classification, regression or multi_label), or as what it is "
            "in Python, with QFTTrainer and AutoModelForMaskedLM."
        )


def _refuse_images(model_class: Any, config: PreTrainedConfig) -> None:
    """Raise for a family whose forward pass needs an image."""
    parameters = inspect.signature(model_class.forward).parameters
    pixels = parameters.get("pixel_values")
    is_required = pixels is not None and pixels.default is inspect.Parameter.empty
    if is_required or config.model_type in _NEED_IMAGES:
        raise ValueError(
            f"{model_class.__name__} needs an image with each example; qft-hf finetune reads text "
            "only. Train it in Python with QFTTrainer and your own collator."
        )


def non_text_parts(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the parts outside the text decoder, such as `vision`."""
    if config.model_type in _SECTIONED:
        return ()
    text = config.get_text_config()
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return tuple(
        name.removesuffix("_config")
        for name, part in parts.items()
        if part is not None and part is not text
    )


def freeze_non_text_parts(model: Any, config: PreTrainedConfig) -> None:
    """Freeze parts that do not read text, and say which; or say which parts were not loaded.

    Their parameters get no gradient, but would count as trained. None is frozen if the decoder is
    not separate from the vision encoder, as in GIT.

    Args:
        model: The model, also one without storage; modified. Its head, its text decoder and its
            embeddings stay as they are.
        config: Configuration of the checkpoint.
    """
    parts = non_text_parts(config)
    if parts and non_text_parts(model.config):
        readers = (model.get_decoder(), model.get_input_embeddings())
        read = {id(parameter) for reader in readers for parameter in reader.parameters()}
        beside = [p for p in model.base_model.parameters() if id(p) not in read]
        for parameter in beside:
            parameter.requires_grad = False
        logger.warning(
            "the rows are text, which %s of %s does not read: %d tensors of its parameters are "
            "frozen. To train them on data that they read, use QFTTrainer in Python",
            " and ".join(parts),
            type(model).__name__,
            len(beside),
        )
    elif parts:
        logger.warning(
            "the checkpoint is a %s. For text, transformers loads only its %s, which is trained "
            "and saved; %s is left out",
            (config.architectures or [type(config).__name__])[0],
            type(model).__name__,
            " and ".join(parts),
        )
