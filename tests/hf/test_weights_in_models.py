"""Models whose own code uses a weight directly, in addition to its module or instead of it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from qft_hf import QFTConfig, QFTLion, dequantize_model_, quantize_model_
from qft_hf.quant import Int8Gradient, QFTWeight, reading
from tests.tolerances import assert_same_bits, snr_db

IDS = torch.arange(40).view(2, 20) * 7 % 90

# The most uses of one weight: the gradient of each is rounded to INT8, and so are their sums.
MOST_USES = 4


def mamba() -> nn.Module:
    """Mamba uses `dt_proj.weight @ ...` instead of the module; the head is tied to the table."""
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=6
        )
    )


def deberta() -> nn.Module:
    """DeBERTa normalizes `rel_embeddings.weight` and projects it by the weights for tokens."""
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=97,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=50,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            type_vocab_size=0,
            num_labels=3,
        )
    )


MODELS = {"mamba": (mamba, IDS), "deberta": (deberta, torch.tensor([0, 2]))}


@pytest.fixture(params=MODELS)
def twins(request):
    """An INT8 model in eval mode, the float model of the same values, and labels."""
    make, labels = MODELS[request.param]
    torch.manual_seed(0)
    model = quantize_model_(make().eval(), QFTConfig())
    return model, dequantize_model_(copy.deepcopy(model), torch.float32), labels


def test_loss_and_gradients_are_those_of_the_float_twin(twins):
    """Logits have equal bits, and gradients lose only what rounding to INT8 loses."""
    model, twin, labels = twins
    optimizer = QFTLion(model.parameters(), lr=1e-3)

    results = [m(IDS, labels=labels) for m in (model, twin)]

    assert_same_bits(results[0].logits.detach(), results[1].logits.detach())
    for result in results:
        result.loss.backward()
    exact = dict(twin.named_parameters())
    n_compared = 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QFTWeight) and exact[name].grad.any():
            gradient, wanted = parameter.grad, exact[name].grad
            assert type(gradient) is Int8Gradient
            once = snr_db(wanted, Int8Gradient.from_float(wanted, dtype=wanted.dtype).dequantize())
            loss_db = once - snr_db(wanted, gradient.dequantize())
            assert loss_db < 10 * math.log10(2 * MOST_USES - 1), name
            n_compared += 1
    assert n_compared > 8
    optimizer.step()


def test_release_equals_stack_and_the_loss_falls(twins):
    start, _, labels = twins
    states, losses = [], []
    for gradient in ("stack", "release"):
        model = copy.deepcopy(start)
        optimizer = QFTLion(model.parameters(), lr=1e-3, gradient=gradient, seed=2)
        for _ in range(5):
            loss = model(IDS, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        states.append(model.state_dict())

    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert_same_bits(ours, theirs)
    assert losses[:5] == losses[5:]
    assert losses[4] < losses[0]


def gemma3n() -> nn.Module:
    """In training each forward pass clamps one weight in place, and a copy of another one."""
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=97,
            vocab_size_per_layer_input=97,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            altup_num_inputs=2,
            laurel_rank=8,
        )
    )


def rwkv() -> nn.Module:
    """RWKV divides weights by powers of two for inference and multiplies them back for training."""
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, rescale_every=2)
    )


@pytest.mark.parametrize("make", [gemma3n, rwkv])
def test_models_that_write_to_their_weights_in_forward_are_their_float_twins(make):
    torch.manual_seed(0)
    model = quantize_model_(make(), QFTConfig())
    twin = dequantize_model_(copy.deepcopy(model), torch.float32)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = IDS + 1  # without padding, for which Gemma 3n's gradient is NaN

    for is_training in (True, False, True):
        outputs = [m.train(is_training)(ids, labels=ids, use_cache=False) for m in (model, twin)]
        assert_same_bits(*(output.logits.detach() for output in outputs))
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, start[name])

    for output in outputs:
        output.loss.backward()
    exact = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (exact[name].grad is None), name
        if parameter.grad is not None and exact[name].grad.any():
            assert snr_db(exact[name].grad, parameter.grad.dequantize()) > 25, name
    QFTLion(model.parameters(), lr=1e-3).step()


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_of_pytorch_is_its_float_twin_on_the_fast_path(norm_first, monkeypatch):
    """In eval mode the layer passes all its weights to one operator."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        36, 4, 50, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    layer = quantize_model_(layer.eval(), QFTConfig())
    twin = dequantize_model_(copy.deepcopy(layer), torch.float32)
    x = torch.randn(2, 7, 36)
    read = []
    plain = reading.read

    def watched(operator, args, kwargs) -> Tensor:
        read.append(str(operator))
        return plain(operator, args, kwargs)

    monkeypatch.setattr(reading, "read", watched)
    assert any(isinstance(p, QFTWeight) for p in layer.parameters())

    with torch.no_grad():
        y = layer(x)

    assert "aten._transformer_encoder_layer_fwd.default" in read
    with torch.no_grad():
        assert_same_bits(y, twin(x))
