"""Adding and removing tokens of an INT8 model."""

import copy
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import dequantize_model_, quantize_model_
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import QFTWeight
from qft_hf.side import QSTConfig, attach_side_network
from tests.models import VOCAB_SIZE, tiny_llama
from tests.tolerances import assert_same_bits

IDS = torch.arange(3, 19)[None]
SIZES = {
    "grow": {"new_num_tokens": VOCAB_SIZE + 9, "mean_resizing": False},
    "grow to a mean": {"new_num_tokens": VOCAB_SIZE + 9},
    "shrink": {"new_num_tokens": VOCAB_SIZE - 7},
    "pad": {"pad_to_multiple_of": 50, "mean_resizing": False},
    "same": {"new_num_tokens": VOCAB_SIZE},
}
CONFIGS = {
    "rows": QFTConfig(),
    "groups": QFTConfig(group_size=16, outlier_fraction=0.05),
    "shared columns": QFTConfig(outlier_fraction=0.05, matmul="int8"),
}


def fields(weight):
    return {name: tensor.clone() for name, tensor in weight.fields().items()}


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_old_rows_keep_their_bits_and_new_ones_are_as_transformers_makes_them(size, tied, config):
    model = quantize_model_(tiny_llama(tied=tied), config)
    # The same values in float, which transformers resizes: new rows must equal those of this twin.
    twin = dequantize_model_(copy.deepcopy(model), torch.float32)
    before = [fields(weight) for weight in tables(model)]
    parameters = tables(model)

    torch.manual_seed(3)
    returned = model.resize_token_embeddings(**size)
    torch.manual_seed(3)
    twin.resize_token_embeddings(**size)

    assert returned is model.get_input_embeddings()
    assert all(now is old for now, old in zip(tables(model), parameters, strict=True))
    assert (tables(model)[0] is tables(model)[1]) == tied
    for weight, old, of_twin in zip(tables(model), before, tables(twin), strict=True):
        n_kept = min(VOCAB_SIZE, len(weight))
        assert weight.shape == of_twin.shape
        for name, tensor in weight.fields().items():
            assert_same_bits(tensor[:n_kept], old[name][:n_kept])
        assert_same_bits(weight.values()[:n_kept], of_twin.detach()[:n_kept])
        # Nearest rounding moves a value by at most half a scale.
        groups = weight.scales.repeat_interleave(weight.group_size or 44, dim=1)[:, :44]
        error = (weight.values() - of_twin.detach()).abs()
        assert (error[n_kept:] <= 0.5001 * groups[n_kept:]).all()
    assert model.config.vocab_size == model.lm_head.out_features == len(tables(twin)[0])
    assert model.model.embed_tokens.num_embeddings == len(tables(twin)[0])
    assert model.model.embed_tokens.padding_idx == twin.model.embed_tokens.padding_idx


def test_new_rows_of_a_table_for_int8_products_have_their_outliers_in_the_same_columns():
    model = quantize_model_(tiny_llama(), CONFIGS["shared columns"])

    model.resize_token_embeddings(200, mean_resizing=False)

    columns = model.lm_head.weight.outlier_columns
    assert len(columns) == 200
    assert (columns == columns[:1]).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_tokens", [VOCAB_SIZE + 9, VOCAB_SIZE - 7])
def test_a_resized_model_computes_saves_and_loads(n_tokens, tied, tmp_path):
    model = quantize_model_(tiny_llama(tied=tied), QFTConfig())
    with torch.no_grad():
        old_logits = model(IDS).logits

    model.resize_token_embeddings(n_tokens)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    with torch.no_grad():
        logits = model(IDS).logits
        n_kept = min(n_tokens, VOCAB_SIZE)
        assert_same_bits(logits[..., :n_kept], old_logits[..., :n_kept])
        assert_same_bits(again(IDS).logits, logits)
    assert again.config.vocab_size == n_tokens


OPTIMIZERS = {
    "lion": lambda p, **o: QFTLion(p, lr=1e-3, **o),
    "lion of 4 bits": lambda p, **o: QFTLion(p, lr=1e-3, momentum_bits=4, **o),
    "adamw": lambda p, **o: QFTAdamW(p, lr=1e-3, **o),
    "sgd": lambda p, **o: QFTSGD(p, lr=1e-3, **o),
}


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("n_tokens", [VOCAB_SIZE + 9, VOCAB_SIZE - 7])
def test_an_optimizer_goes_on_and_rows_that_stay_keep_their_state(n_tokens, make, gradient):
    """Rows are independent, so those that stay are updated as in a model that was not resized."""
    model = quantize_model_(tiny_llama(tied=True), QFTConfig())
    optimizer = make(model.parameters(), gradient=gradient)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    weight = model.lm_head.weight
    state = {name: tensor.clone() for name, tensor in optimizer.state[weight].items()}
    n_kept = min(n_tokens, VOCAB_SIZE)

    model.resize_token_embeddings(n_tokens, mean_resizing=False)

    for name, tensor in optimizer.state[weight].items():
        if tensor.ndim:
            assert len(tensor) == n_tokens
            assert_same_bits(tensor[:n_kept], state[name][:n_kept])
            fresh = optimizer.state_format(weight)[name].fill
            assert (tensor[n_kept:] == fresh).all()
        else:
            assert_same_bits(tensor, state[name])
    before = weight.codes.clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert (weight.codes != before).any()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_biased_head_and_a_scaled_table_are_resized_too():
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=42, intermediate_size=77, num_hidden_layers=1,
        num_attention_heads=3, max_position_embeddings=50,
    )  # fmt: skip
    bert = quantize_model_(BertForMaskedLM(config), QFTConfig())
    optimizer = QFTLion(bert.parameters(), lr=1e-3)
    bert(IDS, labels=IDS).loss.backward()
    optimizer.step()
    bert.resize_token_embeddings(150)
    assert bert.cls.predictions.decoder.bias.shape == (150,)
    bert(IDS, labels=IDS).loss.backward()
    optimizer.step()

    bart = quantize_model_(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=VOCAB_SIZE, d_model=24, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=36,
                decoder_ffn_dim=36, max_position_embeddings=40, scale_embedding=True,
            )
        ),
        QFTConfig(),
    )  # fmt: skip
    cls = type(bart.model.shared)
    bart.resize_token_embeddings(150)
    assert type(bart.model.shared) is cls
    assert bart.lm_head.weight is bart.model.encoder.embed_tokens.weight
    assert isinstance(bart.lm_head.weight, QFTWeight)
    assert bart(input_ids=IDS, labels=IDS).logits.shape[-1] == 150

    gemma = quantize_model_(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=36, head_dim=8,
                num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            )
        ),
        QFTConfig(),
    )  # fmt: skip
    gemma.resize_token_embeddings(150)
    assert gemma(IDS).logits.shape[-1] == 150


def test_modules_that_are_float_are_resized_as_ever():
    config = QFTConfig(modules_to_not_convert=["lm_head", "embed_tokens"])
    model = quantize_model_(tiny_llama(), config)

    model.resize_token_embeddings(150)

    assert type(model.lm_head) is torch.nn.Linear
    assert model(IDS).logits.shape[-1] == 150


def test_an_optimizer_for_norms_alone_is_no_mistake(caplog):
    """PyTorch's way to step in backward, an optimizer for each parameter, warned for each norm."""
    norm = torch.nn.LayerNorm(5)
    optimizer = QFTLion(norm.parameters())
    norm(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert caplog.text == ""


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_without_any_int8_weight_says_so_once(make, caplog):
    model = torch.nn.Linear(5, 3)
    optimizer = make(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 5)).sum().backward()
        with caplog.at_level(logging.WARNING, logger="qft_hf"):
            optimizer.step()

    (message,) = [r.getMessage() for r in caplog.records]
    assert "trains no INT8 weight: its 2 parameters are float" in message
    assert "quantize_model_(model, qft_hf.QFTConfig())" in message


def test_one_int8_weight_is_enough_to_say_nothing(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    optimizer = QFTLion(model.parameters(), lr=1e-3)  # made before quantization
    quantize_model_(model, QFTConfig(modules_to_not_convert=["0"]))
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()

    assert caplog.records == []


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_that_would_stay_untrained_beside_a_side_network_are_refused(sizes, is_int8):
    """They were added to the frozen embeddings, and the saved side network fit no base again."""
    base = tiny_llama()
    if is_int8:
        quantize_model_(base, QFTConfig())
    model = attach_side_network(base, QSTConfig(r=2))
    rows = model.get_input_embeddings().weight.shape

    if sizes == "same":
        model.resize_token_embeddings(**SIZES[sizes])
    else:
        with pytest.raises(ValueError, match=r"would learn nothing, .* Use tokens that there are"):
            model.resize_token_embeddings(**SIZES[sizes])

    assert model.get_input_embeddings().weight.shape == rows
    assert model.config.vocab_size == rows[0]


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_side_network_says_that_added_tokens_will_not_learn(is_int8, caplog):
    """They stayed untrained without a word, and the side network was saved without them."""
    base = tiny_llama()
    if is_int8:
        quantize_model_(base, QFTConfig())
    rows = base.config.vocab_size
    base.resize_token_embeddings(rows + 3)
    base.resize_token_embeddings(rows + 2)
    attach_side_network(base, QSTConfig(r=2))
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("qft_hf")]
    assert "LlamaForCausalLM has 2 embeddings that resize_token_embeddings added" in message

    caplog.clear()
    base = tiny_llama()
    base.resize_token_embeddings(rows - 3)
    attach_side_network(base, QSTConfig(r=2))
    assert not [r for r in caplog.records if r.name.startswith("qft_hf")]


def test_a_float_model_with_embeddings_of_another_form_is_resized_by_its_own_code(monkeypatch):
    """Its embeddings may have no weight; counting added rows must not fail there."""
    model = tiny_llama()
    table = model.get_input_embeddings()
    resized = []
    monkeypatch.setattr(model, "get_input_embeddings", lambda: torch.nn.ModuleList([table]))
    monkeypatch.setattr(model, "_resize_token_embeddings", lambda n, *_: resized.append(n) or table)
    model.resize_token_embeddings(len(table.weight) + 2)
    assert resized == [len(table.weight) + 2]
