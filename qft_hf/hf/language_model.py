"""Models that learn next tokens: what loads them, and what they have beside a decoder of text."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)


def language_class(config: Any) -> Any:
    """Return the class of transformers that makes and loads a model that learns next tokens.

    Models that see images besides are trained on text alone by whoever gives them no image.

    Args:
        config: The model's.

    Raises:
        ValueError: It is of no such model.
    """
    advice = "QFTTrainer trains others in Python, and qft_hf.memory_ledger measures their states."
    if config.is_encoder_decoder:
        raise ValueError(
            f"A model that learns next tokens is wanted, and that of {type(config).__name__} has "
            f"an encoder, which would read the answers that its decoder is to learn. {advice}"
        )
    own_code = getattr(config, "auto_map", None) or {}
    for auto, known in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known or auto.__name__ in own_code:
            return auto
    raise ValueError(
        f"A model that learns next tokens is wanted, and {type(config).__name__} is of none that "
        f"transformers knows. {advice}"
    )


def parts_beside_text(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the parts of a model that are no part of its decoder of text, such as `vision`."""
    text = config.get_text_config()
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return tuple(
        name.removesuffix("_config")
        for name, part in parts.items()
        if part is not None and part is not text
    )


def freeze_beside_text(model: Any) -> int:
    """Freeze what text does not reach: it would get no gradient, and count as trained.

    Args:
        model: Its head and its decoder of text, with the embeddings, stay as they are. Modified.

    Returns:
        How many tensors are frozen; none where a decoder is not apart from what sees, as in GIT.
    """
    decoder = model.get_decoder()
    read = {id(p) for part in (decoder, model.get_input_embeddings()) for p in part.parameters()}
    beside = [p for p in model.base_model.parameters() if id(p) not in read]
    for parameter in beside:
        parameter.requires_grad = False
    return len(beside)
