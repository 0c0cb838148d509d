"""Packed examples keep every token and do not affect each other."""

import random

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM

from qft_hf import QFTConfig, quantize_model_
from qft_hf.hf.finetune.evaluation import token_losses
from qft_hf.hf.finetune.packing import (
    collate_blocks,
    count_tokens,
    pack,
    refuse_leaky_packing,
    refuse_leaky_packing_family,
    shortened,
)
from qft_hf.nn.loss import IGNORED
from tests.scripts.commands import load

LENGTHS = [[5], [1, 1, 1], [0, 7, 0, 0, 3], [13, 0, 1, 6, 29, 2]]  # short, empty, over many blocks


def examples_of(lengths):
    """Examples of distinct tokens; every third label is learned."""
    tokens = iter(range(sum(lengths)))
    ids = [[next(tokens) for _ in range(length)] for length in lengths]
    labels = [[IGNORED if token % 3 else token for token in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("block_tokens", [1, 4, 5, 7, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_are_the_stream(lengths, block_tokens):
    examples = examples_of(lengths)

    blocks = list(pack(examples, block_tokens))

    stream = [token for row in examples["input_ids"] for token in row]
    assert [token for block in blocks for token in block["input_ids"]] == stream
    assert all(len(block["input_ids"]) == block_tokens for block in blocks[:-1])
    starts = {row[0] for row in examples["input_ids"] if row}
    for block in blocks:
        position = None
        columns = zip(
            *(block[name] for name in ("input_ids", "labels", "position_ids")), strict=True
        )
        for token, label, found in columns:
            position = 0 if position is None or token in starts else position + 1
            assert found == position
            assert label == (IGNORED if token % 3 or position == 0 else token)


def test_rows_that_were_filtered_out_are_not_packed():
    """`Dataset.data` still holds them: reading it directly would bring them back."""
    examples = examples_of([3, 4, 5, 6]).select([3, 1])

    blocks = pack(examples, 2)

    assert [token for row in blocks["input_ids"] for token in row] == [*range(12, 18), *range(3, 7)]
    assert count_tokens(examples) == 10


def test_count_of_many_chunks():
    lengths = random.Random(0).choices(range(20), k=300)
    examples = examples_of(lengths).map(lambda row: row, writer_batch_size=7)

    assert count_tokens(examples) == sum(lengths)
    assert len(pack(examples, 16)) == -(-sum(lengths) // 16)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEADS = {"head_dim": 8, "sliding_window": 5}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 4}
APART = {
    "Llama": SIZES,
    "Mistral": SIZES | HEADS,
    "Mixtral": SIZES | MOE,
    "Qwen2": SIZES,
    "Qwen3": SIZES | HEADS,
    "Qwen3Moe": SIZES | HEADS | MOE | {"moe_intermediate_size": 24},
    "Gemma2": SIZES | HEADS,
    "Gemma3": SIZES | HEADS,
    "Phi": SIZES,
    "Phi3": SIZES | {"pad_token_id": 0},
    "Olmo2": SIZES,
    "Granite": SIZES,
    "StableLm": SIZES,
    "Starcoder2": SIZES,
    "Cohere": SIZES,
    "GPTNeoX": SIZES,
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 4},
}
CROSSING = {
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Mamba2": SIZES | MAMBA,
}
KEEPS_FALCON_APART = Version(transformers.__version__) >= Version("5.24")
(APART if KEEPS_FALCON_APART else CROSSING)["Falcon"] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def config_of(family, sizes):
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**sizes)


def tiny(family, sizes):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config_of(family, sizes)).eval()


@pytest.mark.parametrize(("family", "sizes"), APART.items(), ids=APART)
def test_a_document_changes_no_loss_of_another_by_a_bit(family, sizes):
    """This holds in evaluation, in training, and with checkpointing, whose code paths differ."""
    model = tiny(family, sizes)
    refuse_leaky_packing(model)
    lengths, generator = [9, 14, 1, 6], torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 64, (n,), generator=generator).tolist() for n in lengths]

    def losses(documents, mode):
        model.train(mode != "evaluation")
        if mode == "checkpointing" and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        blocks = list(pack(Dataset.from_dict({"input_ids": documents, "labels": documents}), 20))
        batch = collate_blocks(blocks, pad_token_id=2)
        torch.manual_seed(0)  # dropout
        logits = model(**batch, use_cache=False).logits
        return torch.nn.functional.pad(token_losses(logits, batch["labels"]), (1, 0)).flatten()

    for mode in ("evaluation", "training", "checkpointing"):
        first = losses(documents, mode)
        assert (first != 0).sum() == sum(lengths) - 5  # all but the first of documents and blocks
        for index, changed in enumerate(documents):
            other = [*documents[:index], [(t + 7) % 64 for t in changed], *documents[index + 1 :]]
            start = sum(lengths[:index])
            moved = first != losses(other, mode)
            inside = moved.clone()
            inside[start : start + lengths[index]] = False
            assert not inside.any(), mode
            assert moved.any() or lengths[index] == 1


@pytest.mark.parametrize("matmul", [None, "dequantize", "int8"])
def test_experts_that_documents_share_are_no_reason_to_refuse(matmul):
    """Experts multiply tokens of all documents together; last bits depend on how many tokens."""
    sizes = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 64}
    mixture = {"num_experts": 32, "num_experts_per_tok": 8}
    model = tiny("Qwen3Moe", SIZES | sizes | mixture)
    model.get_input_embeddings().requires_grad_(False)
    if matmul:
        quantize_model_(model, QFTConfig(matmul=matmul))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}

    refuse_leaky_packing(model.train())

    # The model is unchanged.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned
    assert 0 < len(learned) < len(list(model.parameters()))
    assert model.training
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


LONG = {"num_hidden_layers": 7, "n_layer": 7, "n_layers": 7, "vocab_size": 4096}


@pytest.mark.parametrize(("family", "sizes"), (APART | CROSSING).items(), ids=APART | CROSSING)
def test_a_short_model_of_the_family_answers_for_a_long_one(family, sizes):
    """A dry run builds a short model, which has all layer types and needs no weights."""
    long = config_of(family, {name: LONG.get(name, size) for name, size in sizes.items()})
    if "pad_token_id" not in sizes:
        long.pad_token_id = 4000
    config = shortened(long)

    short = AutoModelForCausalLM.from_config(config)

    assert long.num_hidden_layers == 7
    assert sum(p.numel() for p in short.parameters()) < 4096 * 32
    types = getattr(long, "layer_types", None)
    assert config.num_hidden_layers == (len(set(types)) if types else 2)
    assert types is None or set(config.layer_types) == set(types)
    if family in CROSSING:
        with pytest.raises(ValueError, match="does not keep them apart"):
            refuse_leaky_packing(short)
    else:
        refuse_leaky_packing(short)


@pytest.mark.parametrize("name", ["Gemma 3n", "Gemma 4"])
def test_layers_that_read_the_keys_of_others_are_shortened_too(name):
    """A dry run of Gemma 4 ended in a KeyError; no test had layers that share keys."""
    config = load("families").TINY[name].config()
    assert config.num_kv_shared_layers > 0
    assert refuse_leaky_packing_family(AutoModelForCausalLM, config, torch.device("cpu"))


@pytest.mark.parametrize(("family", "sizes"), CROSSING.items(), ids=CROSSING)
def test_families_that_do_not_keep_documents_apart_are_refused(family, sizes):
    model = tiny(family, sizes)
    with pytest.raises(
        ValueError, match=f"{family}.* does not keep them apart .* Set packing to f"
    ):
        refuse_leaky_packing(model.train())
    assert model.training
