"""Tiny models of commonly trained families of text, image and sound models, each with a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 131
IMAGE = 130  # placeholder token of an image
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
# Each layer has its own embedding of each token, and the last two share keys and values.
GEMMA_PER_LAYER = {
    "head_dim": 12, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
SEQ2SEQ = {
    **NO_DROPOUT, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Causal, Masked, Seq2Seq = (
    hf.AutoModelForCausalLM,
    hf.AutoModelForMaskedLM,
    hf.AutoModelForSeq2SeqLM,
)


def ids(length: int = 24) -> Tensor:
    """Return two sequences of token ids; the default length is enough tokens for INT8 products."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 120, (2, length), generator=generator)


def values(*shape: int) -> Tensor:
    """Return two random images or recordings, each of this shape."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))


Batch = dict[str, Any]


def text() -> Batch:
    """Return sequences that are their own labels."""
    return {"input_ids": ids(), "labels": ids()}


def beginning() -> Batch:
    """Return the first five tokens of the sequences of `text`."""
    return {"input_ids": ids()[:, :5]}


class Tiny(NamedTuple):
    """A model with tens of thousands of parameters.

    Attributes:
        auto: The auto class of transformers that builds and loads it.
        config: Returns its configuration.
        batch: Returns the arguments of a forward pass that computes a loss.
        prompt: Returns the arguments of `generate`; None for a model that generates no text.
    """

    auto: Any
    config: Callable[[], Any]
    batch: Callable[[], Batch] = text
    prompt: Callable[[], Batch] | None = None

    def model(self) -> Any:
        """Return the model in training mode, with the same values at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.auto.from_config(self.config(), dtype=torch.float32).train()


def reader(auto: Any, config: Any, beside: dict[str, Any]) -> Tiny:
    """Return a text model with the sizes `SIZES`, overridden and extended by `beside`."""
    prompt = None if auto is Masked else beginning
    return Tiny(auto, lambda: config(**SIZES | beside), prompt=prompt)


OF_TEXT = {
    name: reader(*given)
    for name, given in {
        "Llama": (Causal, hf.LlamaConfig, {}),
        "Mistral": (Causal, hf.MistralConfig, {}),
        "Qwen2": (Causal, hf.Qwen2Config, {}),
        "Qwen3": (Causal, hf.Qwen3Config, {"head_dim": 16}),
        "SmolLM3": (Causal, hf.SmolLM3Config, {}),
        "Phi-3": (Causal, hf.Phi3Config, {}),
        "OLMo 2": (Causal, hf.Olmo2Config, {}),
        "Granite": (Causal, hf.GraniteConfig, {}),
        "Cohere 2": (Causal, hf.Cohere2Config, {"head_dim": 12}),
        "GLM-4": (Causal, hf.Glm4Config, {"head_dim": 12}),
        "Gemma": (Causal, hf.GemmaConfig, {"head_dim": 12}),
        "Gemma 2": (Causal, hf.Gemma2Config, {"head_dim": 12}),
        "Gemma 3": (Causal, hf.Gemma3TextConfig, {"head_dim": 12}),
        "Gemma 3n": (Causal, hf.Gemma3nTextConfig, GEMMA_PER_LAYER | {
            "altup_num_inputs": 2, "laurel_rank": 8,
            "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        }),
        "Gemma 4": (Causal, hf.Gemma4TextConfig, GEMMA_PER_LAYER | {
            "global_head_dim": 24, "use_double_wide_mlp": True,
        }),
        "Gemma 4, MoE": (Causal, hf.Gemma4TextConfig, {
            "head_dim": 12, "global_head_dim": 24, "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True,
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        }),
        "Falcon": (Causal, hf.FalconConfig, {"new_decoder_architecture": False, "num_kv_heads": 4}),
        "GPT-2": (Causal, hf.GPT2Config, {
            "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }),
        "GPT-NeoX": (Causal, hf.GPTNeoXConfig, {}),
        "OPT": (Causal, hf.OPTConfig, {
            **NO_DROPOUT, "ffn_dim": 72, "word_embed_proj_dim": 48,
        }),
        "BLOOM": (Causal, hf.BloomConfig, {"n_layer": 2, "n_head": 4}),
        "Mamba": (Causal, hf.MambaConfig, {"state_size": 8}),
        "Mixtral": (Causal, hf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "Qwen3-MoE": (Causal, hf.Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "head_dim": 12}),
        "DeepSeek-V3": (Causal, hf.DeepseekV3Config, {
            **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        }),
        "gpt-oss": (Causal, hf.GptOssConfig, {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12,
        }),
        "Llama 4": (Causal, hf.Llama4TextConfig, {
            "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 72,
            "head_dim": 12,
        }),
        "BERT": (Masked, hf.BertConfig, ENCODER),
        "RoBERTa": (Masked, hf.RobertaConfig, ENCODER),
        "DeBERTa-v2": (Masked, hf.DebertaV2Config, {**ENCODER, "relative_attention": True}),
        "ModernBERT": (Masked, hf.ModernBertConfig, {}),
        "BART": (Seq2Seq, hf.BartConfig, SEQ2SEQ),
        "T5": (Seq2Seq, hf.T5Config, {
            "d_model": 48, "d_kv": 12, "d_ff": 72, "num_layers": 1, "num_heads": 4,
            "dropout_rate": 0.0, "decoder_start_token_id": 0,
        }),
    }.items()
}  # fmt: skip

SIDE = 32  # height and width of an image in pixels
LAYERS: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
# A vision transformer that sees an image as 16 patches.
VISION: dict[str, Any] = {**LAYERS, "intermediate_size": 72, "image_size": SIDE, "patch_size": 8}
LANGUAGE = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}
# Qwen's vision transformer takes patches of 4 by 4 pixels and merges 4 of them into one token.
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "num_heads": 2,
    "patch_size": 4,
}  # fmt: skip
QWEN_LANGUAGE: dict[str, Any] = {
    **LANGUAGE,
    "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 129, "vision_start_token_id": 128,
    "vision_end_token_id": 127,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    **LAYERS, "intermediate_size": 72, "vocab_size": VOCABULARY, "conv_dim": [16, 16],
    "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "layerdrop": 0.0,
}  # fmt: skip


def pictures(side: int = SIDE) -> Tensor:
    """Return two images."""
    return values(3, side, side)


def classes() -> Tensor:
    """Return the class labels of two images or recordings."""
    return torch.tensor([0, 1])


def boxes() -> Batch:
    """Return two images with one labeled object in each."""
    thing = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
    return {"pixel_values": pictures(64), "labels": [thing, thing]}


def pairs() -> Batch:
    """Return two images with captions."""
    return {"pixel_values": pictures(), "input_ids": ids(), "return_loss": True}


def about_pictures(n_tokens: int, **more: Any) -> Batch:
    """Return text with an image of `n_tokens` tokens in each sequence."""
    tokens = ids()
    tokens[:, 1 : 1 + n_tokens] = IMAGE
    return {"input_ids": tokens, "labels": tokens, "pixel_values": pictures()} | more


def about_patches() -> Batch:
    """Return text about two images of 4 by 4 patches, in the form that Qwen's models take."""
    batch = about_pictures(4, pixel_values=values(16, 2 * 3 * 4 * 4).flatten(0, 1))
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (batch["input_ids"] == IMAGE).int()
    return batch | {"image_grid_thw": grid, "mm_token_type_ids": kinds}


def question(batch: Batch) -> Batch:
    """Return the batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def teller(config: Callable[[], Any], batch: Callable[[], Batch]) -> Tiny:
    """Return a model that generates text about images."""
    return Tiny(hf.AutoModelForImageTextToText, config, batch, lambda: question(batch()))


OF_IMAGES_AND_SOUND = {
    "ViT": Tiny(
        hf.AutoModelForImageClassification,
        lambda: hf.ViTConfig(**VISION),
        lambda: {"pixel_values": pictures(), "labels": classes()},
    ),
    "DINOv2": Tiny(
        hf.AutoModelForImageClassification,
        lambda: hf.Dinov2Config(**VISION),
        lambda: {"pixel_values": pictures(), "labels": classes()},
    ),
    "Swin": Tiny(
        hf.AutoModelForImageClassification,
        lambda: hf.SwinConfig(
            image_size=SIDE, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2],
            window_size=4,
        ),
        lambda: {"pixel_values": pictures(), "labels": classes()},
    ),
    "SegFormer": Tiny(
        hf.AutoModelForSemanticSegmentation,
        lambda: hf.SegformerConfig(
            hidden_sizes=[16, 32, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=32,
        ),
        lambda: {"pixel_values": pictures(64), "labels": pictures(64)[:, 0].gt(0).long()},
    ),
    "DETR": Tiny(
        hf.AutoModelForObjectDetection,
        lambda: hf.DetrConfig(
            backbone_config=hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
                out_features=["stage4"],
            ),
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=8,
        ),
        boxes,
    ),
    "CLIP": Tiny(
        hf.AutoModel,
        lambda: hf.CLIPConfig(
            vision_config=VISION, text_config=SIZES | {"num_attention_heads": 2},
            projection_dim=24,
        ),
        pairs,
    ),
    "SigLIP": Tiny(
        hf.AutoModel,
        lambda: hf.SiglipConfig(
            vision_config=VISION, text_config=SIZES | {"projection_size": 48},
        ),
        pairs,
    ),
    "LLaVA": teller(
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**SIZES),
            image_token_id=IMAGE,
        ),
        lambda: about_pictures(16),
    ),
    "PaliGemma": teller(
        lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=48),
            text_config=hf.GemmaConfig(**SIZES, head_dim=12), image_token_id=IMAGE,
            projection_dim=48,
        ),
        lambda: about_pictures(16, token_type_ids=torch.ones(2, 24, dtype=torch.long)),
    ),
    "Gemma 3, with images": teller(
        lambda: hf.Gemma3Config(
            vision_config=VISION, text_config=SIZES | {"head_dim": 12}, image_token_id=IMAGE,
            mm_tokens_per_image=4,
        ),
        lambda: about_pictures(4, token_type_ids=about_patches()["mm_token_type_ids"].long()),
    ),
    "Qwen2.5-VL": teller(
        lambda: hf.Qwen2_5_VLConfig(
            vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            text_config=QWEN_LANGUAGE, **QWEN_TOKENS,
        ),
        about_patches,
    ),
    "Qwen3-VL": teller(
        lambda: hf.Qwen3VLConfig(
            vision_config={
                **QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
            text_config=QWEN_LANGUAGE, **QWEN_TOKENS,
        ),
        about_patches,
    ),
    "InternVL": teller(
        lambda: hf.InternVLConfig(
            vision_config=VISION | {"image_size": [SIDE, SIDE], "patch_size": [8, 8]},
            text_config=hf.Qwen2Config(**SIZES), image_token_id=IMAGE, downsample_ratio=0.5,
        ),
        lambda: about_pictures(4),
    ),
    "Whisper": Tiny(
        hf.AutoModelForSpeechSeq2Seq,
        lambda: hf.WhisperConfig(
            **SEQ2SEQ, num_mel_bins=20, max_source_positions=50, max_target_positions=30,
        ),
        lambda: {"input_features": values(20, 100), "labels": ids()},
        lambda: {"input_features": values(20, 100)},
    ),
    "Wav2Vec2": Tiny(
        hf.AutoModelForCTC,
        lambda: hf.Wav2Vec2Config(**SPEECH),
        lambda: {"input_values": values(4000), "labels": ids(6)},
    ),
    "HuBERT": Tiny(
        hf.AutoModelForCTC,
        lambda: hf.HubertConfig(**SPEECH),
        lambda: {"input_values": values(4000), "labels": ids(6)},
    ),
    "AST": Tiny(
        hf.AutoModelForAudioClassification,
        lambda: hf.ASTConfig(
            **LAYERS, intermediate_size=72, max_length=64, num_mel_bins=32, patch_size=16,
            frequency_stride=8, time_stride=8,
        ),
        lambda: {"input_values": values(64, 32), "labels": classes()},
    ),
}  # fmt: skip

TINY = OF_TEXT | OF_IMAGES_AND_SOUND
