"""`qft-hf inspect` and `qft-hf export` on checkpoints whose figures are known."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, MixtralConfig

from qft_hf import QFTConfig, QFTWeight, quantize_model_
from qft_hf_cli import main
from tests.models import tiny_bert, tiny_llama

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folders(tmp_path):
    """A float model and its INT8 version with groups of 16 columns."""
    tiny_llama().save_pretrained(tmp_path / "float")
    model = quantize_model_(tiny_llama(), QFTConfig(group_size=16, outlier_fraction=0.05))
    model.save_pretrained(tmp_path / "int8")
    return tmp_path


@pytest.fixture
def inspected(result_of):
    def run(*words):
        return {weight["name"]: weight for weight in result_of("inspect", *words)}

    return run


def test_figures_are_those_of_the_stored_tensors(folders, inspected):
    weights = inspected(folders / "int8")

    model = AutoModelForCausalLM.from_pretrained(folders / "int8")
    stored = {n: p for n, p in model.named_parameters() if isinstance(p, QFTWeight)}
    assert list(weights) == list(stored)
    weight = stored[NAME]
    found = weights[NAME]
    assert found["shape"] == [44, 75]
    assert found["stored_bytes"] == 44 * (75 + 4 * 5 + 6 * 4)  # codes, 5 scales, 4 outliers
    assert found["outlier_share"] == 4 / 75
    assert found["largest_outlier"] == weight.outlier_values.abs().max()
    assert found["smallest_scale"] == weight.scales.min()
    assert found["largest_scale"] == weight.scales.max()
    # Rounding to nearest makes one code 127 in each of 44 x 5 groups, and more by coincidence.
    assert 220 <= found["saturated_share"] * 44 * 75 < 240
    assert found["zero_share"] == (weight.codes == 0).float().mean()
    assert found["error"] is None


def test_the_error_against_the_original_is_rounding_and_no_more(folders, inspected):
    weights = inspected(folders / "int8", "--original", folders / "float")

    plain = dict(tiny_llama().named_parameters())
    model = AutoModelForCausalLM.from_pretrained(folders / "int8")
    for name, weight in model.named_parameters():
        if isinstance(weight, QFTWeight):
            difference = weight.dequantize().double() - plain[name].double()
            expected = difference.norm() / plain[name].double().norm()
            assert weights[name]["error"] == pytest.approx(expected.item(), rel=1e-5)
            # Rounding to nearest errs by half a scale, plus the FP32 error of two products.
            assert 0.4 < weights[name]["largest_error"] <= 0.5 + 128 * 2**-23


@pytest.mark.parametrize(
    "config",
    [
        # The projections of GPT-2 are transposed, and one is square.
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2),
        # Stored as a matrix with the rows of all experts.
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        ),
        # Experts that are transposed as well.
        GptOssConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=32,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("group_size", [None, 16])
def test_the_error_of_a_weight_that_is_not_stored_in_its_own_shape(
    config, group_size, tmp_path, inspected
):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "float")
    quantize_model_(model, QFTConfig(group_size=group_size)).save_pretrained(tmp_path / "int8")

    weights = inspected(tmp_path / "int8", "--original", tmp_path / "float")

    stored = {n: p for n, p in model.named_parameters() if isinstance(p, QFTWeight)}
    assert not all(weight.arrangement.is_plain for weight in stored.values())
    for name, weight in stored.items():
        difference = weight.dequantize().double() - plain[name].double()
        expected = difference.norm() / plain[name].double().norm()
        assert weights[name]["error"] == pytest.approx(expected.item(), rel=1e-5)
        assert weights[name]["largest_error"] <= 0.5 + 128 * 2**-23


def test_an_original_of_another_shape_is_refused(folders, refused):
    tiny_llama(intermediate_size=76).save_pretrained(folders / "other")
    assert "Give the model that the checkpoint was made from" in refused(
        "inspect", folders / "int8", "--original", folders / "other"
    )


@pytest.mark.parametrize("as_int8", [False, True])
def test_an_original_of_another_family_is_refused_before_it_is_loaded(as_int8, folders, refused):
    """An INT8 original was once reported as damaged, tensor by tensor."""
    other = tiny_bert()
    if as_int8:
        quantize_model_(other, QFTConfig())
    other.save_pretrained(folders / "other")
    assert re.search(
        r"type 'bert', and .* type 'llama'\. Give the mo",
        refused("inspect", folders / "int8", "--original", folders / "other"),
    )


def test_a_float_checkpoint_is_refused(folders, refused):
    assert "does not hold INT8 weights of qft_hf (quant_method is None" in refused(
        "inspect", folders / "float"
    )


@pytest.mark.parametrize("command", ["inspect", "export"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", None, "cannot be loaded: model.safetensors or .* is missing"),
        ("model.safetensors", b"", "cannot be loaded: .* is damaged"),
        ("model.safetensors.index.json", b"{}", "cannot be loaded: .* has no weight_map"),
        ("config.json", None, "holds a PEFT adapter .* merge_and_unload"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_explained(
    command, name, content, said, folders, refused
):
    """Missing weights ended in a traceback, and an adapter was said to lack a config.json."""
    source = folders / "int8"
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").unlink()
    if name == "config.json":
        (source / "adapter_config.json").write_text("{}")
    (source / name).unlink(missing_ok=True)
    if content is not None:
        (source / name).write_bytes(content)
    target = [folders / "plain"] if command == "export" else []
    assert re.search(said, refused(command, source, *target))


def test_a_side_network_is_no_original(folders, refused):
    """The folder of a finished run was said to be of one that has not finished."""
    (folders / "side").mkdir()
    for name in ("side_network.json", "run.yaml"):
        (folders / "side" / name).write_text("{}")
    assert "holds a side network without the model beside" in refused(
        "inspect", folders / "int8", "--original", folders / "side"
    )


def test_export_has_the_values_of_the_checkpoint(folders, capsys):
    main(["export", str(folders / "int8"), str(folders / "plain"), "--dtype", "float32"])
    assert capsys.readouterr().out == f"written to {folders / 'plain'}\n"

    model = AutoModelForCausalLM.from_pretrained(folders / "int8")
    plain = dict(AutoModelForCausalLM.from_pretrained(folders / "plain").named_parameters())
    for name, parameter in model.named_parameters():
        values = parameter.dequantize() if isinstance(parameter, QFTWeight) else parameter
        assert torch.equal(plain[name], values), name
