"""Estimates agree with live ledgers and with the tensors that autograd saves."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    DbrxConfig,
    DeepseekV3Config,
    Ernie4_5_VLMoeTextConfig,
    FastVlmConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPTNeoConfig,
    GPTNeoXJapaneseConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
)
from transformers.utils import is_timm_available

from qft_hf import (
    QFTSGD,
    QFTConfig,
    QFTLion,
    QFTWeight,
    QSTConfig,
    estimate_memory,
    estimate_side_memory,
    memory_ledger,
    quantize_model_,
)
from qft_hf.hf import recommend, shipped
from qft_hf.hf.estimate import _workload, skeleton
from qft_hf.hf.language_model import freeze_non_text_parts
from qft_hf.hf.optimizers import OPTIMIZERS
from qft_hf.hf.recommendation import LONGEST
from qft_hf.optim.settings import GRADIENTS
from tests.models import tiny_bert, tiny_llama
from tests.scripts.commands import load

ROOT = Path(__file__).parents[2]

FORMATS = [
    QFTConfig(),
    QFTConfig(group_size=11, outlier_fraction=0.0, modules_to_not_convert=["lm_head"]),
    QFTConfig(matmul="int8"),
]


@pytest.mark.parametrize(
    ("optim", "bits"), [("qft_lion", 8), ("qft_lion", 4), ("qft_sgd", None)], ids=str
)
@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("config", FORMATS, ids=["default", "other", "int8"])
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_states_equal_the_ledger_of_a_live_model(tied, dtype, config, gradient, optim, bits):
    model = tiny_llama(tied=tied, dtype=dtype)
    model.config.dtype = dtype
    modes = {"gradient": gradient, "optimizer": optim, "momentum_bits": bits}
    predicted = estimate_memory(model, config=config, **modes)
    from_config = estimate_memory(model.config, config=config, **modes)

    quantize_model_(model, config)
    if bits:
        optimizer = QFTLion(model.parameters(), gradient=gradient, momentum_bits=bits)
    else:
        optimizer = QFTSGD(model.parameters(), gradient=gradient)
    ids = torch.arange(12)[None]
    for _ in range(2):  # momentum exists from the first step, gradients before the second
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()
    live = memory_ledger(model, optimizer)

    tensors = (*model.state_dict().values(), *model.buffers())
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}  # a tied one counts once
    assert live.bytes_by_kind["weights"] == sum(stored.values())
    assert predicted.rows == live.rows
    # Without a model, rotary tables count as FP32, which from_pretrained gives every model.
    assert from_config.rows[:-1] == live.rows[:-1]
    assert predicted.n_parameters == live.n_parameters
    assert predicted.percent_of_fp32_adam == pytest.approx(live.percent_of_fp32_adam, rel=1e-12)


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_saves(dtype, checkpointing, matmul):
    model = tiny_llama(
        dtype=dtype, hidden_size=96, intermediate_size=160, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = QFTConfig(matmul=matmul)
    quantize_model_(model, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.data_ptr() for p in model.parameters() if not isinstance(p, QFTWeight)}
    saved: dict[int, torch.Tensor] = {}  # by storage; kept alive so that addresses stay distinct

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = None if isinstance(tensor, QFTWeight) else tensor.untyped_storage().data_ptr()
        if address is not None and address not in own:
            saved[address] = tensor
        return tensor

    ids = torch.randint(131, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    rows = {
        row.state: row.bytes
        for row in estimate_memory(
            model, config=config, batch_size=2, sequence_length=64,
            gradient_checkpointing=checkpointing,
        ).activation_rows
    }  # fmt: skip
    # Autograd saves only log-probabilities of the logits. The final norm belongs to no layer.
    predicted = rows["saved by the layers"] + 128 * 131 * 4
    assert predicted < measured < 1.1 * predicted + 128 * 96 * (4 + 2 * dtype.itemsize)


def test_int8_inputs_are_counted_where_all_modules_save_them():
    def saved(**arguments) -> int:
        rows = estimate_memory(
            tiny_llama(), config=QFTConfig(**arguments), gradient_checkpointing=False
        ).activation_rows
        return next(row.bytes for row in rows if row.state == "saved by the layers")

    floats = saved()
    codes = saved(matmul="int8")
    # FP32 inputs of 44, 44, 44 and 75 elements, with one outlier column each, in two layers of
    # 2048 tokens.
    assert floats - codes == 2 * 2048 * (3 * (44 + 44 + 44 + 75) - 4 * 4 - 4 * 4)
    assert saved(matmul="int8", int8_products={"*": ["forward", "input_gradient"]}) == floats
    # A module that saves its float input may share it with others, so all count as saving it.
    assert saved(matmul="int8", int8_products={"down_proj": []}) == floats


def test_experts_save_codes_from_as_many_tokens_each_as_a_gpu_wants():
    config = MixtralConfig(dtype="bfloat16", num_hidden_layers=2)

    def saved(tokens: int, **arguments) -> int:
        rows = estimate_memory(
            config, config=QFTConfig(**arguments), sequence_length=tokens,
            gradient_checkpointing=False,
        ).activation_rows  # fmt: skip
        return next(row.bytes for row in rows if row.state == "saved by the layers")

    def by_codes(width: int) -> int:  # bytes saved: codes for BF16, less scale and outliers
        return 2 * width - (width + 4 + 2 * -(-width // 100))

    # Each expert gets a quarter of the tokens, 256 or 512; the second weight needs 293 for INT8.
    of_attention = 2 * by_codes(4096)
    of_experts = 2 * by_codes(4096) + by_codes(2 * 14_336)
    assert saved(1024) - saved(1024, matmul="int8") == 2 * 1024 * of_attention
    assert saved(2048) - saved(2048, matmul="int8") == 2 * 2048 * (of_attention + of_experts)
    without = saved(2048, matmul="int8", int8_products={"experts": []})
    assert saved(2048) - without == 2 * 2048 * of_attention


def activations(vocabulary: int = 32_000, **arguments) -> dict[str, int]:
    """Bytes by kind for LLaMA-7B in bf16, whose hidden states have 4,096 elements."""
    config = LlamaConfig(dtype="bfloat16", vocab_size=vocabulary)
    rows = estimate_memory(config, sequence_length=2048, **arguments).activation_rows
    return {row.state: row.bytes for row in rows}


def test_a_chunked_loss_holds_one_run_of_logits_whatever_the_vocabulary():
    row = "logits and their gradient"
    whole = [activations(words)[row] for words in (32_000, 64_000)]
    chunked = [activations(words, chunked_loss=True)[row] for words in (32_000, 64_000)]
    # BF16 logits, their FP32 log-probabilities, and the FP32 gradient of those.
    assert whole == [2048 * 32_000 * (2 + 4 + 4), 2048 * 64_000 * (2 + 4 + 4)]
    assert chunked[0] == chunked[1]
    # FP32 logits of as many words as a tile of the head has rows; FP32 sums of hidden states.
    assert 2048 * (4096 + 4096) * 4 <= chunked[0] < whole[0] / 5


def test_a_gradient_at_a_time_is_counted_with_release_and_operands_with_int8_products():
    stack, release = activations(gradient="stack"), activations(gradient="release")
    assert "largest gradient" not in stack
    assert release["largest gradient"] == 32_000 * 4096 * (1 + 4 / 256)  # of the head
    int8 = activations(config=QFTConfig(matmul="int8"))
    assert "INT8 gradient operands" not in stack
    # The gradient of the widest output, 11,008 elements, quantized by tokens and by outputs.
    assert int8["INT8 gradient operands"] == 2 * 2048 * 11_008 + 4 * (2048 + 11_008)
    # At most 2**24 elements of a weight are float at a time: in FP32, in BF16, and its gradient.
    assert stack["float tiles"] == release["float tiles"] == 2**24 * (4 + 2 + 2)


def test_the_gradient_of_a_table_comes_when_layers_and_logits_are_freed():
    """That of the table that Gemma 3n has for all layers was added to them."""
    config = Gemma3nTextConfig(dtype="bfloat16")
    table, shared = (rows * (1 + 4 / 256) for rows in (262_144 * 35 * 256, 262_400 * 2048))

    def rows_of(tokens: int) -> dict[str, int]:
        found = estimate_memory(config, gradient="release", sequence_length=tokens)
        return {row.state: row.bytes for row in found.activation_rows}

    many, one = rows_of(2048), rows_of(1)

    assert many["largest gradient"] == shared
    held = one["saved by the layers"] + one["logits and their gradient"]
    assert one["largest gradient"] == table - held


def test_what_layers_have_saved_is_freed_before_a_table_has_its_gradient():
    load("families")  # for its neighbours
    from common.tiny_models import TINY

    model = quantize_model_(TINY["Gemma 3n"].model(), QFTConfig())
    table = model.model.embed_tokens_per_layer.weight
    alive: WeakSet[Any] = WeakSet()
    counts = []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    def count(_: object = None) -> None:
        counts.append(sum(saved.tensor.nbytes for saved in alive))

    table.register_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = model(**TINY["Gemma 3n"].batch()).loss
    count()
    loss.backward()

    assert counts[1] < counts[0] / 50


def test_a_large_configuration_takes_no_memory_and_has_the_known_size():
    config = LlamaConfig(dtype="bfloat16")  # the defaults are LLaMA-7B
    figures = estimate_memory(config)
    assert figures.n_parameters == 6_738_415_616
    assert figures.state_bytes / figures.n_parameters < 3.11
    release = estimate_memory(config, gradient="release")
    assert release.state_bytes / release.n_parameters < 2.15
    assert "gradients" not in {row.state for row in release.rows}
    packed = estimate_memory(config, gradient="release", momentum_bits=4)
    assert packed.state_bytes / packed.n_parameters < 1.65
    lomo = estimate_memory(config, gradient="release", optimizer="qft_sgd")
    assert lomo.state_bytes / lomo.n_parameters < 1.07
    assert {row.state for row in release.rows} - {row.state for row in lomo.rows} == {"momentum"}


MIXTURES = {  # upper bounds of the states with release, in GB
    "qwen3-30b-a3b": (
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768,
        ),
        65,
    ),
    "mixtral-8x7b": (MixtralConfig(), 98),
    "gpt-oss-20b": (GptOssConfig(num_hidden_layers=24, num_local_experts=32), 44),
    "deepseek-v3": (DeepseekV3Config(), 1400),
    "llama-4-scout": (Llama4TextConfig(), 225),
}  # fmt: skip


@pytest.mark.parametrize(("config", "gigabytes"), MIXTURES.values(), ids=MIXTURES)
def test_mixtures_of_experts_keep_less_than_a_thousandth_float(config, gigabytes):
    config.dtype = torch.bfloat16
    estimate = estimate_memory(config, gradient="release")

    assert 0.97 * gigabytes < estimate.state_bytes / 1e9 <= gigabytes
    weights = next(row.bytes for row in estimate.rows if row.state == "INT8 weights")
    assert weights > 0.999 * estimate.n_parameters


def test_the_recommendation_is_the_first_mode_that_fits():
    config = LlamaConfig(dtype="bfloat16")
    seen = [recommend(config, gpu) for gpu in (80, 36, 28, 24, 12)]
    assert [(r.gradient, r.gradient_checkpointing, r.fits) for r in seen] == [
        ("stack", False, True),
        ("release", False, True),
        ("stack", True, True),
        ("release", True, True),
        ("release", True, False),
    ]
    for choice in seen:
        assert choice.fits == (choice.estimate.total_bytes <= choice.usable_bytes)
        assert choice.fits == (choice.longest_sequence >= 2048)


def test_two_cards_of_24_gb_train_a_13b_that_one_does_not():
    """Two cards fit it with release, and with 4-bit momentum even at 2,048 tokens."""
    config = skeleton(shipped.architecture("llama-2-13b"))
    of = partial(recommend, config, 24, chunked_loss=True)
    assert not of(512).fits
    choice = of(512, n_processes=2)
    assert (choice.fits, choice.gradient) == (True, "release")
    assert 1024 < choice.longest_sequence < 2048
    assert "GB of 22.1 usable of each of 2, fits" in str(choice)
    assert of(2048, n_processes=2, momentum_bits=4).fits
    assert not of(2048, momentum_bits=4).fits


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_longest_sequence_fits_and_one_token_more_does_not(batch_size):
    config = LlamaConfig(dtype="bfloat16", max_position_embeddings=LONGEST)
    nearest = recommend(config, 24, 65536, batch_size)
    assert not nearest.fits
    longest = nearest.longest_sequence
    assert f"Sequences of up to {longest:,} tokens would fit, at batch size {batch_size}" in str(
        nearest
    )
    assert recommend(config, 24, longest, batch_size).fits
    longer = recommend(config, 24, longest + 1, batch_size)
    assert 0 < longer.missing_bytes < 10e6  # the memory of one token


def test_a_card_that_is_too_small_for_the_states_says_so():
    choice = recommend(LlamaConfig(dtype="bfloat16"), 12)
    assert choice.longest_sequence == 0
    assert "does not fit: 4.8 GB are missing. The states alone take 14.0 GB" in str(choice)


def test_no_length_is_named_that_the_model_does_not_take():
    choice = recommend(LlamaConfig(dtype="bfloat16"), 80)
    assert choice.longest_sequence == 2048
    assert str(choice).endswith("fits, with sequences of up to the model's 2,048 tokens")
    choice = replace(recommend(tiny_llama(), 1000), positions=None, longest_sequence=LONGEST)
    assert str(choice).endswith("GB of 920.0 usable, fits, with sequences of any length")


def test_a_folder_is_enough_and_no_weight_is_needed(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        assert estimate_memory(source) == estimate_memory(model.config)
        assert recommend(source, 1) == recommend(model.config, 1)


@pytest.mark.parametrize("source", ["no/folder/here", "nobody/nothing", "an empty folder"])
def test_an_unknown_model_says_what_was_looked_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if source == "an empty folder":
        source = tmp_path
    with pytest.raises(FileNotFoundError, match=r"neither a folder with a config\.json nor"):
        recommend(source, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "gpu_memory must be a positive, finite number of GB, got 0"),
        (("24",), "gpu_memory must be a positive, finite number of GB, got '24'"),
        ((24, 0), "must be 1 or more, got 1 and 0"),
        ((24, 512, -1), "must be 1 or more, got -1 and 512"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(tiny_llama(), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_states_of_a_real_model_are_those_that_were_estimated(gradient, optim):
    folder = ROOT / "data" / "smollm2"
    if not folder.exists():
        pytest.skip("data/smollm2 is not there: python scripts/fetch_demo.py smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QFTConfig())
    optimizer = OPTIMIZERS[optim].optimizer_class(model.parameters(), gradient=gradient)
    ids = torch.arange(8)[None]
    for _ in range(2):  # states are largest just before the second step
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()
    live = memory_ledger(model, optimizer)

    predicted = estimate_memory(folder, gradient=gradient, optimizer=optim)
    assert predicted.rows == live.rows


def test_fewer_momentum_bits_are_recommended_only_where_they_are_asked_for():
    config = LlamaConfig(dtype="bfloat16")
    plain = recommend(config, 12)
    asked = recommend(config, 12, momentum_bits=4)

    assert plain.momentum_bits is None
    assert not plain.fits
    assert "momentum_bits" not in str(plain)
    assert asked.momentum_bits == 4
    assert "momentum_bits=4" in str(asked)
    assert asked.estimate.state_bytes < plain.estimate.state_bytes


def test_the_table_adds_up_and_says_that_it_is_arithmetic():
    figures = estimate_memory(tiny_llama())
    text = str(figures)
    assert "by arithmetic" in text
    assert figures.total_bytes == figures.state_bytes + figures.activation_bytes
    assert sum(row.bytes for row in figures.rows) == figures.state_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient": "both"}, "gradient must be 'stack' or 'release', got 'both'"),
        ({"optimizer": "lion"}, "optimizer must be 'qft_lion' or .*, got 'lion'"),
        ({"momentum_bits": 3}, "momentum_bits must be 8 or 4, got 3"),
        ({"momentum_bits": 0}, "use QFTSGD"),
        ({"momentum_bits": 8, "optimizer": "qft_adamw"}, "qft_adamw has no momentum_bits, got 8"),
        ({"n_processes": 0}, "n_processes must be 1 or more, got 0"),
    ],
)
def test_unsupported_modes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(tiny_llama(), **arguments)


@pytest.mark.parametrize(
    ("quantized", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_4bit": True}, "bitsandbytes"),  # of an early version, which did not name itself
    ],
)
def test_a_model_that_is_quantized_with_another_method_is_refused(quantized, method):
    """Its training was planned as if it were float, and no run can begin with it."""
    config = tiny_llama().config
    config.quantization_config = quantized
    with pytest.raises(ValueError, match=rf"with {method}\. QFT starts from float weights: "):
        estimate_memory(config)
    with pytest.raises(ValueError, match=rf"with {method}\. .* train a side network beside it"):
        recommend(config, 24)


def test_a_model_without_decoder_sizes_says_what_measures_it():
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=12, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no num_attention_heads.*memory_ledger measures any"):
        estimate_memory(model)


VISIBLE = load("families").OF_IMAGES_AND_SOUND


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "LLaVA", "Gemma 3, with images"])
def test_a_model_that_sees_has_all_its_states_and_says_what_is_not_counted(name, tmp_path):
    """The estimate from a configuration in a folder once ended in a traceback."""
    model = VISIBLE[name].model()
    model.config.save_pretrained(tmp_path)
    predicted = estimate_memory(tmp_path, sequence_length=24, batch_size=2)

    live = memory_ledger(quantize_model_(model, QFTConfig()))

    assert predicted.rows[:4] == live.rows[:4]  # the weights: the live model has no gradients yet
    assert predicted.n_parameters == live.n_parameters
    assert predicted.not_counted == ("vision",)
    assert "without the activations of vision" in str(predicted)
    assert estimate_memory(tiny_llama()).not_counted == ()


def sizes_of(config):
    """Return the widths of all layers that the activations are computed from."""
    work = _workload(config, compute_bytes=4, tokens=1, checkpointing=False, chunked_loss=False)
    return (work.hidden, work.attention, work.key_value, work.intermediate)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
PER_LAYER = {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8, **SMALL}
OTHER_NAMES = {
    "OPT": (OPTConfig(ffn_dim=72, word_embed_proj_dim=32, **SMALL), 72),
    "XGLM": (XGLMConfig(d_model=32, ffn_dim=72, num_layers=3, attention_heads=4), 72),
    "BLOOM": (BloomConfig(hidden_size=32, n_layer=3, n_head=4), 128),
    "GPT-Neo": (GPTNeoConfig(attention_types=[[["global"], 3]], num_layers=3, hidden_size=32), 128),
    "CTRL": (CTRLConfig(n_embd=32, dff=72, n_layer=3, n_head=4), 72),
    "MPT": (MptConfig(d_model=32, expansion_ratio=3, n_layers=3, n_heads=4), 96),
    "GPT-NeoX Japanese": (GPTNeoXJapaneseConfig(intermediate_multiple_size=2, **SMALL), 64),
}


@pytest.mark.parametrize(("config", "width"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_the_width_of_an_mlp_has_many_names(config, width):
    """They are decoders, and were refused with the advice to pass the configuration of one."""
    config.vocab_size = 50
    assert sizes_of(config)[-1] == width
    linear = [m for m in skeleton(config).modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.out_features == width for m in linear) == 3
    estimate = estimate_memory(config, sequence_length=16)
    assert estimate.activation_bytes > 0
    assert estimate.not_counted == ()


def test_sections_of_a_text_model_are_not_parts_that_read_something_else(caplog):
    """DBRX's sections `attn` and `ffn` were said not to read text, and its plan was refused."""
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=50, ffn_config=ffn)
    config.attn_config.kv_n_heads = 2
    config.attn_config.rope_theta = 1e4  # needed by the model, and not set by default

    assert sizes_of(config)[-1] == 2 * 24
    assert estimate_memory(config, sequence_length=16).not_counted == ()
    freeze_non_text_parts(skeleton(config), config)
    assert not caplog.records


def test_a_mixture_may_have_no_width_but_that_of_its_experts():
    config = Qwen3_5MoeTextConfig(
        moe_intermediate_size=24, num_experts_per_tok=4, shared_expert_intermediate_size=40, **SMALL
    )
    assert sizes_of(config)[-1] == 4 * 24 + 40


def test_layers_of_many_widths_count_as_the_widest():
    """Their sizes are lists, or raise when they are asked of the whole configuration."""
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    gemma3n = Gemma3nTextConfig(
        intermediate_size=[64, 96, 80],
        layer_types=types,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 3,
        vocab_size=50,
        vocab_size_per_layer_input=50,
        laurel_rank=4,
        **PER_LAYER,
    )
    gemma4 = Gemma4TextConfig(
        intermediate_size=64,
        layer_types=types,
        global_head_dim=16,
        vocab_size=50,
        vocab_size_per_layer_input=50,
        num_kv_shared_layers=0,
        **PER_LAYER,
    )
    assert sizes_of(gemma3n) == (32, 4 * 8, 2 * 8, 96)
    assert sizes_of(gemma4) == (32, 4 * 16, 2 * 16, 64)
    ernie = Ernie4_5_VLMoeTextConfig(intermediate_size=20, moe_intermediate_size=[16, 12], **SMALL)
    assert sizes_of(ernie)[-1] == ernie.num_experts_per_tok * 16 > 20
    for config in (gemma3n, gemma4):
        assert recommend(config, 24, 16).fits


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (DbrxConfig(), "of DbrxConfig: AttributeError.* Correct the config"),
        pytest.param(
            FastVlmConfig(),
            "of FastVlmConfig: ImportError: Timm.*pip install timm.* Install the package",
            marks=pytest.mark.skipif(is_timm_available(), reason="timm is there"),
        ),
        (LlamaConfig(hidden_act="no such"), "of LlamaConfig: KeyError.* Correct the config"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_cannot_be_built_is_named_with_the_reason(config, why):
    """It was a traceback of transformers."""
    with pytest.raises(ValueError, match=f"cannot build the model {why}"):
        estimate_memory(config)


@pytest.mark.parametrize(
    ("config", "fault"),
    [(VISIBLE["ViT"].config(), "ViTConfig belongs to"), (T5Config(), "T5Config has an encoder")],
    ids=["ViT", "T5"],
)
def test_a_configuration_of_no_decoder_is_refused(config, fault):
    with pytest.raises(ValueError, match=f"{fault}.*memory_ledger"):
        estimate_memory(config)


@pytest.mark.parametrize("source", ["model", "configuration", "folder"])
@pytest.mark.parametrize("config", FORMATS[1:], ids=["other", "int8"])
def test_an_int8_model_is_estimated_in_its_own_format(config, source, tmp_path):
    """The default format was once assumed, and named a third too little."""
    model = quantize_model_(tiny_llama(tied=False), config)
    expected = estimate_memory(tiny_llama(tied=False), config=config)
    model.save_pretrained(tmp_path)
    of = {"model": model, "configuration": model.config, "folder": tmp_path}[source]

    found = estimate_memory(of)
    assert found.rows[:4] == expected.rows[:4]
    assert found.activation_rows == expected.activation_rows
    assert found != estimate_memory(tiny_llama(tied=False))
    assert recommend(of, 1) == recommend(of, 1, config=config)
    side = QSTConfig(r=4)
    assert estimate_side_memory(of, side, base="int8") == estimate_side_memory(
        of, side, base="int8", config=config
    )

    if config.matmul == "int8":
        other = replace(config, int8_products={"down_proj": ["forward"]})
        assert estimate_memory(of, config=other).activation_rows == (
            estimate_memory(tiny_llama(tied=False), config=other).activation_rows
        )
    with pytest.raises(ValueError, match=r"already quantized with outlier_fraction=.*=0\.3 was"):
        estimate_memory(of, config=replace(config, outlier_fraction=0.3))


@pytest.mark.parametrize("part", ["the table", "the first layer", "the layers"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_frozen_parameters_have_neither_gradient_nor_momentum(part, gradient):
    model = tiny_llama(tied=False)
    of = {"the table": model.model.embed_tokens, "the first layer": model.model.layers[0]}
    of.get(part, model.model.layers).requires_grad_(False)
    predicted = estimate_memory(model, gradient=gradient)

    quantize_model_(model, QFTConfig())
    optimizer = QFTLion(model.parameters(), gradient=gradient)
    ids = torch.arange(12)[None]
    for _ in range(2):
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()

    assert predicted.rows == memory_ledger(model, optimizer).rows
    assert predicted.n_parameters == memory_ledger(model).n_parameters


def test_a_model_that_is_no_decoder_is_refused_as_its_configuration_is():
    """A classifier was once charged logits over all words."""
    for model in (tiny_bert(), T5ForConditionalGeneration(T5Config(num_layers=1, d_model=12))):
        with pytest.raises(ValueError, match="A causal language model is needed"):
            estimate_memory(model)
