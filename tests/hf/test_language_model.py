"""Which configurations are those of causal language models that text can train."""

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BertGenerationConfig,
    Blip2Config,
    BlipConfig,
    ElectraConfig,
    GitConfig,
    GPT2Config,
    IdeficsConfig,
    InstructBlipConfig,
    Kosmos2Config,
    LlamaConfig,
    MarianConfig,
    PegasusConfig,
    RobertaConfig,
    TrOCRConfig,
    WhisperConfig,
    XLMConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

from qft_hf.hf.language_model import language_class

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
HALVES = {"vocab_size": 40, "d_model": 12, "is_encoder_decoder": False, "is_decoder": True}
HALVES |= {"pad_token_id": 0}
ENCODERS = [BertConfig, BertGenerationConfig, ElectraConfig, RobertaConfig, XLMRobertaConfig]
SEEN = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
SEEN |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
NEED_IMAGES = {
    "BLIP": BlipConfig(
        text_config=SIZES | {"encoder_hidden_size": 12}, vision_config=SEEN, projection_dim=12
    ),
    "BLIP-2": Blip2Config(
        text_config={"model_type": "opt", "ffn_dim": 20, "word_embed_proj_dim": 12} | SIZES,
        qformer_config=SIZES | {"encoder_hidden_size": 12},
        vision_config=SEEN,
    ),
    "InstructBLIP": InstructBlipConfig(
        text_config={"model_type": "opt", "ffn_dim": 20, "word_embed_proj_dim": 12} | SIZES,
        qformer_config=SIZES | {"encoder_hidden_size": 12},
        vision_config=SEEN,
    ),
    "GIT": GitConfig(vision_config=SEEN, **SIZES),
    "Idefics": IdeficsConfig(
        vision_config=SEEN | {"embed_dim": 12}, cross_layer_interval=1, **SIZES
    ),
    "Kosmos-2": Kosmos2Config(
        text_config={
            "vocab_size": 40, "embed_dim": 12, "layers": 2, "ffn_dim": 20, "attention_heads": 2,
        },
        vision_config=SEEN,
        latent_query_num=2,
    ),
}  # fmt: skip


def built(config):
    """Build the class that transformers would take, unasked."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    raise AssertionError(config)


def sees_ahead(model):
    ids = torch.arange(5, 13)[None]
    changed = ids.clone()
    changed[0, 4:] = 20
    with torch.no_grad():
        return not torch.equal(model(ids).logits[0, :4], model(changed).logits[0, :4])


def copies(model):
    """Whether the loss compares the output at a token with that token."""
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids)
    same = torch.nn.functional.cross_entropy(found.logits[0], ids[0])
    return torch.allclose(found.loss, same, rtol=1e-5, atol=0)


@pytest.mark.parametrize("config_class", ENCODERS)
def test_an_encoder_is_refused_and_the_same_family_as_a_decoder_is_not(config_class):
    """They were trained on the tokens that they had to predict, down to a loss of nearly zero."""
    config = config_class(**SIZES)
    assert sees_ahead(built(config))
    with pytest.raises(ValueError, match=r"an encoder.*task classification, regression or"):
        language_class(config)

    config.is_decoder = True
    assert not sees_ahead(built(config))
    assert not copies(built(config))
    assert language_class(config).__name__ == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    "config",
    [
        XLNetConfig(vocab_size=40, d_model=12, n_layer=1, n_head=2, d_inner=20),
        XLMConfig(vocab_size=40, emb_dim=12, n_layers=1, n_heads=2, causal=True),
        TrOCRConfig(vocab_size=40, d_model=12, decoder_layers=1, decoder_attention_heads=2),
        BartConfig(decoder_layers=1, decoder_attention_heads=2, **HALVES),
        MarianConfig(decoder_layers=1, decoder_attention_heads=2, **HALVES),
        PegasusConfig(decoder_layers=1, decoder_attention_heads=2, **HALVES),
        WhisperConfig(
            decoder_layers=1, decoder_attention_heads=2, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, **HALVES,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_loss_of_labels_that_are_not_moved_is_refused(config):
    """Their classes leave the move by one token to the caller, and the Trainer does not make it."""
    assert copies(built(config))
    with pytest.raises(ValueError, match=r"so it would learn to copy.*moved by one token"):
        language_class(config)


@pytest.mark.parametrize("config", NEED_IMAGES.values(), ids=NEED_IMAGES)
def test_a_model_that_needs_an_image_is_refused_by_name(config):
    """It was loaded and then ended in an error of its forward pass."""
    model = built(config)
    ids = torch.arange(5, 13)[None]
    with pytest.raises((TypeError, ValueError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name} needs an image.*your own collator"):
        language_class(config)


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()], ids=["Llama", "GPT-2"])
def test_a_decoder_is_accepted(config):
    assert language_class(config).__name__ == "AutoModelForCausalLM"
