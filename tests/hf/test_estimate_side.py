"""Estimates of side tuning agree with live ledgers and with the tensors that autograd saves."""

import pytest
import torch
from transformers import LlamaConfig

from qft_hf import (
    QFTConfig,
    QFTWeight,
    QSTConfig,
    attach_side_network,
    estimate_memory,
    estimate_side_memory,
    memory_ledger,
    quantize_model_,
    recommend,
)
from qft_hf.hf.base import BASES, base_format
from qft_hf.side import DOWNSAMPLES
from tests.models import tiny_llama

SIZES = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_states_equal_the_ledger_of_a_live_model(tied, dtype, base, tmp_path):
    model = tiny_llama(tied=tied, dtype=dtype)
    model.save_pretrained(tmp_path)
    side, config = QSTConfig(r=11, rank=3), QFTConfig(group_size=13)
    predicted = estimate_side_memory(tmp_path, side, base=base, config=config)

    form = base_format(base, model, config=config)
    live_model = type(model).from_pretrained(tmp_path, quantization_config=form)
    for module in live_model.modules():
        # On a CPU with BF16 support, bitsandbytes would repack weights at the first evaluation,
        # with two-byte scales.
        module.support_avx512bf16_for_cpu = False
    attach_side_network(live_model, side)
    optimizer = torch.optim.AdamW(p for p in live_model.parameters() if p.requires_grad)
    ids = torch.arange(12)[None]
    for _ in range(2):  # moments exist from the first step, gradients before the second
        optimizer.step()
        live_model(input_ids=ids, labels=ids).loss.backward()
    live = memory_ledger(live_model, optimizer)

    assert predicted.rows == live.rows
    assert predicted.n_parameters == live.n_parameters
    assert predicted.state_bytes == live.total_bytes


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_saves(dtype, checkpointing, downsample):
    side = QSTConfig(r=4, rank=6, downsample=downsample)
    model = attach_side_network(tiny_llama(dtype=dtype, **SIZES), side).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # by storage; kept alive so that addresses stay distinct

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            saved[address] = tensor
        return tensor

    ids = torch.randint(131, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    rows = {
        row.state: row.bytes
        for row in estimate_side_memory(
            tiny_llama(dtype=dtype, **SIZES), side, base="float", batch_size=2, sequence_length=64,
            gradient_checkpointing=checkpointing,
        ).activation_rows
    }  # fmt: skip
    kept = (
        "downsampled hidden states", "saved by the side layers", "last side state and norm",
    )  # fmt: skip
    predicted = sum(rows.get(name, 0) for name in kept)
    if not checkpointing:  # otherwise they are cast again when the layer is recomputed
        predicted += rows.get("side weights, cast", 0)
    predicted += 128 * 131 * 4  # of the logits, only their log-probabilities are saved
    assert 0.9 < predicted / measured < 1.1


def test_the_ledger_counts_nf4_weights_that_a_cpu_has_laid_out_anew(tmp_path):
    """The ledger once looked for the scales of scales, which repacking removes."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2}
    model = tiny_llama(**sizes, num_key_value_heads=1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=base_format("nf4", model))
    before = {row.state: row.bytes for row in memory_ledger(loaded).rows}
    with torch.no_grad():
        loaded(torch.arange(12)[None])

    after = {row.state: row.bytes for row in memory_ledger(loaded).rows}
    assert after["NF4 weights"] == before["NF4 weights"]
    assert after["NF4 scales"] > 0


def test_a_base_that_is_quantized_is_estimated_as_it_is():
    """Its memory was given as if it were NF4, the default for a float base."""
    side, config = QSTConfig(r=11), QFTConfig(group_size=13)
    model = quantize_model_(tiny_llama(), config)

    expected = estimate_side_memory(tiny_llama(), side, base="int8", config=config)
    assert estimate_side_memory(model, side) == expected
    with pytest.raises(ValueError, match=r"base=nf4 was asked for, but the model is .* in int8"):
        estimate_side_memory(model, side, base="nf4")
    assert estimate_side_memory(tiny_llama(), side).rows[0].state == "NF4 weights"


@pytest.mark.parametrize(
    ("quantized", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
    ],
)
def test_a_base_in_a_format_without_an_estimate_is_refused_by_its_name(quantized, stored):
    """The error said that `base`, which was not given, must be one of three."""
    config = tiny_llama().config
    config.quantization_config = quantized
    with pytest.raises(ValueError, match=f"is stored in {stored}, .* or start from the float mod"):
        estimate_side_memory(config)
    with pytest.raises(ValueError, match=f"is stored in {stored}, .* trained beside it without"):
        recommend(config, 24, side=QSTConfig())


def test_a_side_network_of_half_the_width_has_a_fourth_of_the_parameters():
    def saved(r):
        figures = estimate_side_memory(LlamaConfig(dtype="bfloat16"), QSTConfig(r=r))
        return {row.state: row.bytes for row in figures.rows}["side network"]

    assert saved(8) / saved(16) == pytest.approx(4, rel=0.1)  # most matrices have two such widths


LLAMA_2_7B = LlamaConfig(dtype="bfloat16")  # the defaults
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, dtype="bfloat16"
)
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "gigabytes", "side", "tokens"),
    [
        (LLAMA_2_7B, 8, QSTConfig(), 2048),
        (LLAMA_3_8B, 8, QSTConfig(), 512),
        (LLAMA_2_70B, 48, QSTConfig(), 512),
        (LLAMA_2_70B, 48, QSTConfig(r=32), 2048),
    ],
    ids=["7B", "8B", "70B", "70B, r=32"],
)
def test_what_the_documentation_says_fits_does_by_arithmetic(config, gigabytes, side, tokens):
    choice = recommend(config, gigabytes, tokens, side=side)

    assert choice.fits
    assert choice.base == "nf4"
    assert str(choice).startswith("method=qst, base=nf4, gradient_checkpointing=")
    every_parameter = recommend(config, gigabytes, tokens)
    assert not every_parameter.fits
    assert str(every_parameter).endswith("or train a side network: method qst")
    assert "by arithmetic" in str(choice.estimate)


def test_the_base_is_stored_in_as_many_bits_as_fit():
    seen = [recommend(LLAMA_2_7B, gpu, side=QSTConfig()) for gpu in (24, 12, 8, 4)]
    assert [(choice.base, choice.fits) for choice in seen] == [
        ("float", True),
        ("int8", True),
        ("nf4", True),
        ("nf4", False),
    ]
    config = LlamaConfig(dtype="bfloat16", max_position_embeddings=2**20)
    asked = recommend(config, 24, side=QSTConfig(), base="nf4")
    assert asked.base == "nf4"
    longest = asked.longest_sequence
    assert recommend(config, 24, longest, side=QSTConfig(), base="nf4").fits
    assert recommend(config, 24, 2**16, side=QSTConfig(), base="nf4").longest_sequence > longest


def test_the_model_that_is_asked_about_stays_as_it_is():
    model = tiny_llama()
    before = {name for name, _ in model.named_modules()}
    estimate_side_memory(model, QSTConfig(r=11))
    assert {name for name, _ in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert estimate_memory(model).n_parameters == sum(p.numel() for p in model.parameters())
    assert not any(isinstance(p, QFTWeight) for p in model.parameters())


def test_processes_share_nothing_beside_a_side_network():
    with pytest.raises(ValueError, match=r"as much memory as one alone\. Leave n_processes out"):
        recommend(tiny_llama(), 24, side=QSTConfig(r=11), n_processes=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "int4"}, "base must be 'nf4' or 'int8' or 'float', got 'int4'"),
        ({"batch_size": 0}, "must be 1 or more, got 0 and 2048"),
        ({"side": QSTConfig(r=16)}, "r=16 does not divide the hidden size 44.*nearest.* is 11"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_side_memory(tiny_llama(), **({"side": QSTConfig(r=11)} | arguments))
