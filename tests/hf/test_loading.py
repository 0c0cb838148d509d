"""`from_pretrained` and `save_pretrained`: quantizing while loading, INT8 checkpoints, damage."""

import json
import logging
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    CLIPTextModel,
    CLIPVisionModel,
    FunnelConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2_5_VLTextModel,
    SiglipVisionModel,
    T5ForConditionalGeneration,
    YoutuConfig,
)
from transformers.trainer_utils import validate_quantization_for_training

from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import dequantize_model_, quantize_model_
from qft_hf.hf.quantizer import QFTQuantizer
from qft_hf.nn import QFTEmbedding, QFTLinear, QuantizedModule
from qft_hf.quant import QFTWeight
from tests.fresh import try_fresh
from tests.hf.checkpoints import IDS, assert_same_state, edit_config, edit_tensors
from tests.models import tiny_bert, tiny_llama
from tests.scripts.commands import load as load_script

TINY = load_script("families").TINY
FORMATS = [
    QFTConfig(),
    QFTConfig(group_size=16, outlier_fraction=0.0),
    QFTConfig(group_size=7, outlier_fraction=0.05),
]
DOWN = "model.layers.1.mlp.down_proj."
YOUTU = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FUNNEL = {
    "vocab_size": 40, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2,
    "d_head": 8, "d_inner": 24, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def int8_folder(tmp_path):
    """An INT8 checkpoint with outliers, one file, untied."""
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


# Loading and saving that works.


@pytest.mark.parametrize("config", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpoint_survives_loading_saving_and_loading(tied, dtype, config, tmp_path):
    tiny_llama(tied=tied, dtype=dtype).save_pretrained(tmp_path / "float", max_shard_size="20KB")

    model = load(tmp_path / "float", quantization_config=config)
    # Shards are so small that the fields of one weight go to several files.
    model.save_pretrained(tmp_path / "int8", max_shard_size="3KB")
    again, info = load(tmp_path / "int8", output_loading_info=True)

    assert_same_state(model, quantize_model_(tiny_llama(tied=tied, dtype=dtype), config))
    assert_same_state(again, model)
    assert not any(info.values())
    for loaded in (model, again):
        assert loaded.lm_head.weight.dtype == dtype
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_small_shards_split_the_fields_of_a_weight(tmp_path):
    """Checks the premise of the test above."""
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path, max_shard_size="3KB")

    files = defaultdict(set)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        files[name.rpartition(".")[0]].add(file)
    assert len(files[DOWN.removesuffix(".")]) > 1


def test_float_weights_never_exist_together(tmp_path, monkeypatch):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    n_float = []
    quantize = QFTQuantizer.quantize

    def spy(self, model, name, tensor):
        n_float.append(
            sum(
                p.ndim == 2 and not p.is_meta and type(p.data) is not QFTWeight
                for p in model.parameters()
            )
        )
        return quantize(self, model, name, tensor)

    monkeypatch.setattr(QFTQuantizer, "quantize", spy)
    load(tmp_path, quantization_config=QFTConfig())

    assert n_float == [0] * len([p for p in model.parameters() if p.ndim == 2])


def test_file_holds_int8_and_a_tied_weight_once(tmp_path):
    quantize_model_(tiny_llama(tied=True), QFTConfig()).save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "model.safetensors")
    assert not [name for name in tensors if "lm_head" in name]
    assert tensors["model.embed_tokens.weight_q"].dtype == torch.int8
    assert {n: t.dtype for n, t in tensors.items() if t.ndim == 2 and n.endswith(".weight")} == {}


def test_tied_weight_that_is_in_the_file_twice_is_tied_again(tmp_path):
    """Other programs write both; comparing them needs `torch.equal` on INT8 weights."""
    tiny_llama(tied=True).save_pretrained(tmp_path)

    def double(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, double)
    model = load(tmp_path, quantization_config=QFTConfig())

    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path)  # untied and different
    edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    model = load(tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("auto", "config"),
    [
        (AutoModelForCausalLM, YoutuConfig(**YOUTU)),
        (AutoModelForMaskedLM, FunnelConfig(**FUNNEL)),
    ],
    ids=["Youtu", "Funnel"],
)
def test_a_padding_row_is_loaded_by_families_that_reset_it(auto, config, tmp_path):
    """They could be trained and saved, and loading them ended in a NotImplementedError."""
    model = auto.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.5
    quantize_model_(model, QFTConfig()).save_pretrained(tmp_path)

    assert_same_state(auto.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_saving_into_the_folder_it_was_loaded_from(int8_folder):
    model = load(int8_folder)
    expected = quantize_model_(tiny_llama(), QFTConfig())

    model.save_pretrained(int8_folder)

    assert_same_state(load(int8_folder), expected)


@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tables_are_known_after_loading(tied, is_int8, tmp_path):
    """A table's gradient never waits in tiles, which would keep the logits' gradient alive."""
    model = tiny_llama(tied=tied)
    if is_int8:
        quantize_model_(model, QFTConfig())
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, **({} if is_int8 else {"quantization_config": QFTConfig()}))

    assert loaded.model.embed_tokens.weight.is_table
    assert loaded.lm_head.weight.is_table == tied
    assert not loaded.model.layers[0].mlp.up_proj.weight.is_table


@pytest.mark.parametrize("columns", [2**15 - 1, 2**15, 2**15 + 1])
def test_weights_as_wide_as_16_bit_numbers_of_columns_survive(columns):
    """At 32,768 columns the largest number fits 16 bits, and the number of columns does not."""
    weights = [
        quantize_model_(nn.Sequential(nn.Linear(columns, 2, bias=False)), QFTConfig())
        for _ in range(2)
    ]

    weights[1].load_state_dict(weights[0].state_dict())

    assert_same_state(*weights)


def test_classifier_with_biases_survives(tmp_path):
    model = quantize_model_(tiny_bert(num_labels=5), QFTConfig(group_size=20))
    model.save_pretrained(tmp_path, max_shard_size="5KB")

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)

    assert_same_state(again, model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_new_head_of_a_float_checkpoint_is_quantized(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path)

    model = BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, quantization_config=QFTConfig()
    )

    assert type(model.classifier) is QFTLinear
    assert isinstance(model.classifier.weight, QFTWeight)
    assert model.classifier.weight.dequantize().abs().max() > 0
    model.save_pretrained(tmp_path / "int8")
    assert_same_state(BertForSequenceClassification.from_pretrained(tmp_path / "int8"), model)


def test_base_model_of_a_larger_checkpoint(int8_folder):
    base = AutoModel.from_pretrained(int8_folder)

    assert_same_state(base, load(int8_folder).model)


def test_state_dict_instead_of_files(int8_folder):
    tensors = load_file(int8_folder / "model.safetensors")
    config = AutoConfig.from_pretrained(int8_folder)

    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)

    assert_same_state(model, load(int8_folder))


def test_outer_dtype_of_an_int8_checkpoint_can_be_chosen(int8_folder):
    model = load(int8_folder, dtype=torch.bfloat16)

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.outlier_values.dtype == torch.float32
    original = load(int8_folder).lm_head.weight
    assert all(
        torch.equal(f, original.fields()[n]) for n, f in model.lm_head.weight.fields().items()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_that_a_family_keeps_in_fp32_stand_for_fp32(dtype, tmp_path):
    """T5 keeps `wo` in FP32 in a float16 model, where it overflows; INT8 checkpoints did not."""
    model = TINY["T5"].model()
    model.save_pretrained(tmp_path / "float")
    quantize_model_(model, QFTConfig()).save_pretrained(tmp_path / "int8")

    plain, loaded = (
        T5ForConditionalGeneration.from_pretrained(tmp_path / kind, dtype=dtype)
        for kind in ("float", "int8")
    )

    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in plain.named_parameters()}
    assert (torch.float32 in dtypes.values()) == (dtype == torch.float16)


PARTS = [
    ("CLIP", CLIPTextModel),
    ("CLIP", CLIPVisionModel),
    ("SigLIP", SiglipVisionModel),
    ("Qwen2.5-VL", Qwen2_5_VLTextModel),
]


@pytest.mark.parametrize(("family", "part"), PARTS, ids=[part.__name__ for _, part in PARTS])
def test_a_part_is_loaded_from_the_folder_of_the_whole_model(family, part, tmp_path):
    """Its configuration, a part of config.json, did not say that weights are INT8: it raised."""
    model = TINY[family].model()
    model.save_pretrained(tmp_path / "float")
    quantize_model_(model, QFTConfig(outlier_fraction=0.03)).save_pretrained(tmp_path / "int8")

    loaded = part.from_pretrained(tmp_path / "int8")

    plain = part.from_pretrained(tmp_path / "float")
    assert not hasattr(plain, "hf_quantizer")
    assert_same_state(loaded, quantize_model_(plain, QFTConfig(outlier_fraction=0.03)))
    loaded.save_pretrained(tmp_path / "part")
    assert_same_state(part.from_pretrained(tmp_path / "part"), loaded)


def test_excluded_modules_stay_float_and_are_recorded(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    config = QFTConfig(modules_to_not_convert=["lm_head", "down_proj"])

    model = load(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")

    for loaded in (model, again):
        assert type(loaded.lm_head) is nn.Linear
        assert type(loaded.model.layers[1].mlp.down_proj) is nn.Linear
        assert type(loaded.model.layers[1].mlp.up_proj) is QFTLinear
        assert type(loaded.model.embed_tokens) is QFTEmbedding
    assert_same_state(again, model)
    saved = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert saved["quantization_config"]["modules_to_not_convert"] == ["lm_head", "down_proj"]


def test_tied_weight_with_one_excluded_user_stays_float(tmp_path):
    """The empty model is not tied yet when the rule for excluded modules is applied."""
    config = QFTConfig(modules_to_not_convert=["lm_head"])
    tiny_llama(tied=True).save_pretrained(tmp_path / "float")

    model = load(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "int8")

    assert type(model.lm_head.weight) is nn.Parameter
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_state(model, quantize_model_(tiny_llama(tied=True), config))
    assert_same_state(load(tmp_path / "int8"), model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, int8_folder, tmp_path):
    expected = load(int8_folder)
    assert_same_state(load(int8_folder, device_map=device_map), expected)

    tiny_llama().save_pretrained(tmp_path / "float")
    quantized = load(tmp_path / "float", device_map=device_map, quantization_config=QFTConfig())
    assert_same_state(quantized, expected)


def test_size_of_a_weight_for_automatic_device_maps(int8_folder):
    model = load(int8_folder)

    for name, parameter in model.named_parameters():
        size = model.hf_quantizer.param_element_size(model, name, parameter) * parameter.numel()
        stored = parameter.stored_bytes if isinstance(parameter, QFTWeight) else parameter.nbytes
        assert size == pytest.approx(stored, rel=1e-12)  # a quotient times its divisor


def test_generate(int8_folder):
    model = load(int8_folder)

    tokens = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_trainer_accepts_a_loaded_model(int8_folder):
    model = load(int8_folder)

    validate_quantization_for_training(model)
    assert model.hf_quantizer.is_serializable()


def test_float_checkpoint_without_a_config_is_left_alone(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)

    again = load(tmp_path)

    assert_same_state(again, model)
    assert type(again.lm_head) is nn.Linear
    assert getattr(again, "hf_quantizer", None) is None


WITHOUT_QFT_HF = """
import sys
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not [name for name in sys.modules if name.startswith("qft_hf")]
print(*info["missing_keys"])
"""


def test_without_qft_hf_every_int8_weight_is_reported_missing(int8_folder):
    run = try_fresh(WITHOUT_QFT_HF, int8_folder)

    model = load(int8_folder)
    weights = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedModule)
    }
    assert set(run.stdout.split()) == weights


def test_a_dtype_that_int8_weights_do_not_have_is_refused(int8_folder, tmp_path):
    """The error once blamed modules_to_not_convert."""
    tiny_llama().save_pretrained(tmp_path / "float")
    message = r"dtype=torch\.float64\. Its weights stand for torch\.float32"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "float", dtype=torch.float64, quantization_config=QFTConfig())
    with pytest.raises(ValueError, match=message):
        load(int8_folder, dtype=torch.float64)


# A quantization config that is passed with an INT8 checkpoint.


def test_the_configuration_of_a_model_may_be_passed(int8_folder):
    """Transformers asks the format in it for `get`, and ended in an AttributeError."""
    model = load(int8_folder)
    assert_same_state(load(int8_folder, config=model.config), model)


def test_same_format_is_accepted_and_the_users_seed_taken(int8_folder):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(int8_folder, quantization_config=QFTConfig(seed=17))

    assert model.config.quantization_config == QFTConfig(seed=17)
    assert_same_state(model, load(int8_folder))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (QFTConfig(group_size=16), "with group_size=None, and group_size=16 was asked for"),
        (QFTConfig(outlier_fraction=0.0), "outlier_fraction=0.01, and outlier_fraction=0.0 was"),
        (
            QFTConfig(modules_to_not_convert=["lm_head"]),
            r"and modules_to_not_convert=\['lm_head'\]",
        ),
    ],
    ids=["group_size", "outlier_fraction", "modules_to_not_convert"],
)
def test_other_format_than_that_of_the_checkpoint_is_refused(config, text, int8_folder):
    with pytest.raises(ValueError, match=text):
        load(int8_folder, quantization_config=config)


# Damaged and foreign INT8 checkpoints.


def without(name):
    return lambda tensors: tensors.pop(name)


def with_value(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def with_tensor(name, function):
    def change(tensors):
        tensors[name] = function(tensors).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without(DOWN + "weight_q"), r"down_proj\.weight_q missing .* copy or save"),
        (without(DOWN + "weight_scale"), r"down_proj\.weight_scale missing"),
        (without(DOWN + "weight_outlier_value"), r"down_proj\.weight_outlier_value missing"),
        (without(DOWN + "weight_outlier_column"), r"down_proj\.weight_outlier_column missing"),
        (without("model.norm.weight"), r"model\.norm\.weight is missing"),
        (
            with_tensor(DOWN + "weight_q", lambda t: t[DOWN + "weight_q"][:, :-1]),
            r"weight_q must be torch.int8 of shape \(44, 75\), got torch.int8 of shape \(44, 74\)",
        ),
        (
            with_tensor(DOWN + "weight_scale", lambda t: t[DOWN + "weight_scale"][:, 0]),
            r"weight_scale must be torch.float32 of shape \(44, 1\), got .* shape \(44,\)",
        ),
        (
            with_tensor(DOWN + "weight_scale", lambda t: t[DOWN + "weight_scale"].bfloat16()),
            r"weight_scale must be torch.float32 .* got torch.bfloat16",
        ),
        (
            with_tensor(DOWN + "weight_q", lambda t: t[DOWN + "weight_q"].to(torch.int16)),
            r"weight_q must be torch.int8 .* got torch.int16",
        ),
        (
            with_tensor(
                DOWN + "weight_outlier_column", lambda t: t[DOWN + "weight_outlier_column"].int()
            ),
            r"weight_outlier_column must be torch.int16 .* got torch.int32",
        ),
        (with_value(DOWN + "weight_q", (0, 0), -128), r"down_proj\.weight_q has -128.* 1 of 3300"),
        (with_value(DOWN + "weight_scale", 3, float("nan")), "positive, finite numbers: 1 of 44"),
        (with_value(DOWN + "weight_scale", 3, float("inf")), "positive, finite numbers: 1 of 44"),
        (with_value(DOWN + "weight_scale", 3, 0.0), "positive, finite numbers: 1 of 44"),
        (with_value(DOWN + "weight_scale", 3, -1.0), "positive, finite numbers: 1 of 44"),
        (with_value(DOWN + "weight_outlier_value", 3, float("inf")), "has NaN or infinite values"),
        (with_value(DOWN + "weight_outlier_column", 3, 75), r"has columns outside \[0, 75\): 1 of"),
        (with_value(DOWN + "weight_outlier_column", 3, -1), r"has columns outside \[0, 75\): 1 of"),
        (
            with_tensor(
                DOWN + "weight_outlier_column",
                lambda t: (t[DOWN + "weight_outlier_column"] + 1) % 75,
            ),
            r"weight_q has codes other than 0 under outliers .* \d+ of 44",
        ),
        (
            with_value("model.norm.weight", 5, float("nan")),
            r"model\.norm\.weight has 1 of 44 values",
        ),
        (
            with_tensor("model.norm.weight", lambda t: t["model.norm.weight"][:-1]),
            r"model\.norm\.weight has shape \(43,\)|mismatch",
        ),
        (
            with_tensor(DOWN + "weight", lambda t: torch.ones(44, 75)),
            r"down_proj\.weight_outlier_column is in .* next to a float weight",
        ),
    ],
)
def test_damage_is_named(change, text, int8_folder):
    edit_tensors(int8_folder, change)

    with pytest.raises((ValueError, RuntimeError), match=text):
        load(int8_folder)


@pytest.mark.parametrize("order", [[0, 0], [1, 0]], ids=["twice", "descending"])
def test_columns_that_do_not_ascend_are_named(order, tmp_path):
    quantize_model_(tiny_llama(), QFTConfig(outlier_fraction=0.05)).save_pretrained(tmp_path)

    def reorder(tensors):
        columns = tensors[DOWN + "weight_outlier_column"]
        columns[0, :2] = columns[0, order]

    edit_tensors(tmp_path, reorder)
    with pytest.raises(ValueError, match="weight_outlier_column has columns that do not ascend"):
        load(tmp_path)


def lose_down_proj(tensors):
    for name in [n for n in tensors if n.startswith(DOWN)]:
        del tensors[name]


def test_every_field_of_a_weight_missing(int8_folder):
    edit_tensors(int8_folder, lose_down_proj)
    with pytest.raises(ValueError, match=r"1 tensor of .*\n- .*down_proj\.weight_q is missing"):
        load(int8_folder)


def test_tied_weight_missing(tmp_path):
    quantize_model_(tiny_llama(tied=True), QFTConfig()).save_pretrained(tmp_path)
    edit_tensors(tmp_path, without("model.embed_tokens.weight_q"))

    with pytest.raises(ValueError, match=r"^1 tensor of .*\n- .*embed_tokens\.weight_q mis"):
        load(tmp_path)


def test_bias_missing(tmp_path):
    quantize_model_(tiny_bert(), QFTConfig()).save_pretrained(tmp_path)
    edit_tensors(tmp_path, without("classifier.bias"))

    with pytest.raises(ValueError, match=r"classifier\.bias is missing"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def float_down_proj(tensors):
    lose_down_proj(tensors)
    tensors[DOWN + "weight"] = torch.ones(44, 75)


def test_float_weight_where_int8_is_expected(int8_folder):
    edit_tensors(int8_folder, float_down_proj)
    with pytest.raises(ValueError, match=r"down_proj\.weight is in the checkpoint as a float"):
        load(int8_folder)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (
            {"modules_to_not_convert": ["down_proj"]},
            r"down_proj\.weight_q, .* is not quantized in this model",
        ),
        (
            {"outlier_fraction": 0},
            r"weight_outlier_value found in the .* outlier_fraction=0, which",
        ),
        ({"group_size": 16}, r"weight_scale must be .* shape \(44, 5\), got"),
        ({"bits": 8}, r"QFTConfig has no bits; its names are"),
    ],
    ids=str,
)
def test_another_format_in_config_json_is_named(format, text, int8_folder):
    edit_config(int8_folder, lambda config: config["quantization_config"].update(format))

    with pytest.raises(ValueError, match=text):
        load(int8_folder)


def test_truncated_file_is_named(int8_folder):
    file = int8_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* copy it again"):
        load(int8_folder)


def test_missing_shard_is_named(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = next(tmp_path.glob("model-00002-of-*"))
    shard.unlink()

    with pytest.raises((ValueError, OSError), match=shard.name):
        load(tmp_path)


def test_int8_checkpoint_does_not_get_a_random_head(tmp_path):
    quantize_model_(tiny_bert().bert, QFTConfig()).save_pretrained(tmp_path)

    with pytest.raises(
        ValueError, match=r"classifier\.weight_q is missing .* a float checkpoint of it, which"
    ):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_head_of_another_size_says_how_to_get_one(tmp_path):
    """The error named the two shapes, and not what a user who wants other labels can do."""
    model = quantize_model_(tiny_bert(num_labels=3), QFTConfig())
    model.save_pretrained(tmp_path / "int8")
    other = {"num_labels": 5, "ignore_mismatched_sizes": True}

    with pytest.raises(ValueError, match=r"\(5, 42\), got .* ignore_mismatched_sizes=True"):
        BertForSequenceClassification.from_pretrained(tmp_path / "int8", **other)

    dequantize_model_(model, torch.float32).save_pretrained(tmp_path / "float")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "float", **other)
    quantize_model_(model, QFTConfig())
    assert isinstance(model.classifier.weight, QFTWeight)
    assert model.classifier.weight.shape == (5, 42)


def test_many_faults_are_counted_and_some_shown(int8_folder):
    def spoil(tensors):
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name].fill_(-1.0)

    edit_tensors(int8_folder, spoil)
    with pytest.raises(ValueError, match="16 tensors of") as caught:
        load(int8_folder)
    assert str(caught.value).count("\n- ") == 10


# Float checkpoints and models that cannot be quantized.


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [DOWN + "weight", "model.norm.weight"])
def test_bad_value_in_a_float_checkpoint_is_named(name, value, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path, with_value(name, -1, value))

    with pytest.raises(ValueError, match=rf"{name} has \d+ of \d+ values that are NaN or infinite"):
        load(tmp_path, quantization_config=QFTConfig())


@pytest.mark.parametrize("cut", [lambda w: w[:, :-1], torch.flatten], ids=["narrow", "flat"])
def test_wrong_shape_in_a_float_checkpoint_is_named(cut, tmp_path):
    """Transformers 5.17 does not check shapes when a quantizer is used."""
    tiny_llama().save_pretrained(tmp_path)
    edit_tensors(tmp_path, with_tensor(DOWN + "weight", lambda t: cut(t[DOWN + "weight"])))

    with pytest.raises(ValueError, match=r"down_proj\.weight has shape .* needs \(44, 75\)"):
        load(tmp_path, quantization_config=QFTConfig())


def test_unknown_excluded_name_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"\['head'\], which match no module"):
        load(tmp_path, quantization_config=QFTConfig(modules_to_not_convert=["head"]))


@pytest.mark.parametrize(
    "device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}]
)
def test_offloading_is_refused(device_map, int8_folder, tmp_path):
    with pytest.raises(ValueError, match="cannot be offloaded"):
        load(int8_folder, device_map=device_map, offload_folder=tmp_path / "offload")


def test_a_tied_model_on_several_devices_is_refused(tmp_path):
    """Accelerate finds ties by equal addresses and would replace all INT8 weights by the table."""
    quantize_model_(tiny_llama(tied=True), QFTConfig()).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"lm_head\.weight is tied .*\['0', '1'\].* Use one"):
        load(tmp_path, device_map={"model": 0, "lm_head": 1})


# --- names in the config of a checkpoint --------------------------------------------------------


NAMING = [
    QFTConfig(modules_to_not_convert=["lm_head"]),
    QFTConfig(matmul="int8", int8_products={"lm_head": ["forward"]}),
]


@pytest.mark.parametrize("config", NAMING, ids=["kept", "products"])
def test_names_of_a_checkpoint_that_this_class_has_not_are_ignored_and_said_once(
    config, tmp_path, caplog
):
    """The check for misspelled names once also refused every checkpoint that names its head."""
    causal = quantize_model_(tiny_llama(), config)
    causal.save_pretrained(tmp_path / "causal")
    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        base = LlamaModel.from_pretrained(tmp_path / "causal")
    said = [record.getMessage() for record in caplog.records if "qft_hf" in record.name]
    assert said == [
        "The checkpoint's quantization_config names lm_head, which LlamaModel does not have: "
        "ignored"
    ]
    expected = causal.model.state_dict()
    assert expected.keys() == base.state_dict().keys()
    assert all(torch.equal(v, base.state_dict()[n]) for n, v in expected.items())

    base.save_pretrained(tmp_path / "base")  # without the names: nothing to say when it is loaded
    caplog.clear()
    LlamaModel.from_pretrained(tmp_path / "base")
    assert [record for record in caplog.records if "qft_hf" in record.name] == []
    again = type(causal).from_pretrained(tmp_path / "causal")  # which has them still has its head
    assert type(again.lm_head) is type(causal.lm_head)
    assert getattr(again.lm_head, "products", None) == getattr(causal.lm_head, "products", None)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_table_that_an_absent_head_keeps_float_stays_so(shards, tmp_path, caplog):
    """Loading was once refused: only the ignored name of the head says that the table is float."""
    config = QFTConfig(modules_to_not_convert=["lm_head"])
    causal = quantize_model_(tiny_llama(tied=True), config)
    causal.save_pretrained(tmp_path / "causal", **shards)

    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        base = LlamaModel.from_pretrained(tmp_path / "causal")

    assert "names lm_head, which LlamaModel does not have: ignored; embed_tokens is float" in (
        caplog.text
    )
    assert_same_state(base, causal.model)
    assert type(base.embed_tokens) is nn.Embedding
    base.save_pretrained(tmp_path / "base")
    assert_same_state(LlamaModel.from_pretrained(tmp_path / "base"), base)
    with pytest.raises(ValueError, match=r"^1 tensor of .*\n- score\.weight_q is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal")


PREFIXED = [
    QFTConfig(modules_to_not_convert=["model.layers.1.self_attn", "lm_head"]),
    QFTConfig(modules_to_not_convert=["model.layers.0.mlp.up_proj"]),
    QFTConfig(matmul="int8", int8_products={"model.layers.1.mlp.down_proj": ["forward"]}),
]


@pytest.mark.parametrize("config", PREFIXED, ids=["component", "full name", "products"])
def test_names_with_the_prefix_of_a_model_hold_for_its_bare_base(config, tmp_path):
    """Only names of heads were tested: others were ignored, and their float weights refused."""
    causal = quantize_model_(tiny_llama(), config)
    causal.save_pretrained(tmp_path / "causal")

    base = LlamaModel.from_pretrained(tmp_path / "causal")

    def formats(model):
        products = {n: getattr(m, "products", None) for n, m in model.named_modules()}
        return {n: str(product) for n, product in products.items() if product is not None}

    assert_same_state(base, causal.model)
    assert formats(base) == formats(causal.model)
    base.save_pretrained(tmp_path / "base")
    again = LlamaModel.from_pretrained(tmp_path / "base")
    assert_same_state(again, base)
    assert formats(again) == formats(base)


def test_a_float_weight_that_nothing_explains_is_refused_beside_an_absent_name(tmp_path):
    config = QFTConfig(modules_to_not_convert=["lm_head"])
    quantize_model_(tiny_llama(tied=True), config).save_pretrained(tmp_path)
    edit_tensors(tmp_path, float_down_proj)

    with pytest.raises(ValueError, match=r"down_proj\.weight is in the checkpoint as a float"):
        LlamaModel.from_pretrained(tmp_path)


def test_names_that_the_user_gives_still_have_to_match(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig(outlier_fraction=0)).save_pretrained(tmp_path / "int8")
    tiny_llama().save_pretrained(tmp_path / "float")
    slip = QFTConfig(outlier_fraction=0, matmul="int8", int8_products={"lm_haed": ["forward"]})
    for folder in ("int8", "float"):
        with pytest.raises(ValueError, match=r"int8_products names \['lm_haed'\]"):
            LlamaForCausalLM.from_pretrained(tmp_path / folder, quantization_config=slip)
    nothing = QFTConfig(
        matmul="int8",
        int8_products={"x": ["forward"]},
        modules_to_not_convert=["layers", "lm_head"],
    )
    with pytest.raises(ValueError, match=r"match no quantized linear .* components of them, or"):
        quantize_model_(tiny_llama(), nothing)
    slip = QFTConfig(modules_to_not_convert=["lm_haed"])
    with pytest.raises(ValueError, match=r"names \['lm_haed'\], which match no module"):
        LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=slip)
