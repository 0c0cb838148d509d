"""Causal language models: which class loads one, and which parts are outside the text decoder."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)


def language_class(config: Any) -> Any:
    """Return the auto class of transformers that makes and loads a causal language model.

    This includes models that also take images: without an image, they train on text alone.

    Args:
        config: Configuration of the model.

    Raises:
        ValueError: The configuration does not belong to a causal language model.
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
            return auto
    raise ValueError(
        f"A causal language model is needed, and {type(config).__name__} belongs to none that "
        f"transformers knows. {advice}"
    )


def non_text_parts(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the parts outside the text decoder, such as `vision`."""
    text = config.get_text_config()
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return tuple(
        name.removesuffix("_config")
        for name, part in parts.items()
        if part is not None and part is not text
    )


def freeze_non_text_parameters(model: Any) -> int:
    """Freeze parameters that text does not reach: they get no gradient, but would count as trained.

    Args:
        model: Modified. Its head, its text decoder and its embeddings stay as they are.

    Returns:
        Number of frozen tensors; 0 if the decoder is not separate from the vision encoder, as in
        GIT.
    """
    decoder = model.get_decoder()
    read = {id(p) for part in (decoder, model.get_input_embeddings()) for p in part.parameters()}
    beside = [p for p in model.base_model.parameters() if id(p) not in read]
    for parameter in beside:
        parameter.requires_grad = False
    return len(beside)
