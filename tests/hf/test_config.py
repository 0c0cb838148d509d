"""`QFTConfig` as a dictionary, in `config.json` and as an argument of `from_pretrained`."""

import copy
import json

import pytest
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from qft_hf.config import QuantizationSpec
from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import quantize_model_
from tests.models import tiny_llama

CONFIGS = [
    QFTConfig(),
    QFTConfig(group_size=48, outlier_fraction=0.0),
    QFTConfig(outlier_fraction=0.5, modules_to_not_convert=["lm_head"], seed=2**63 - 1),
    QFTConfig(matmul="int8", int8_products={"lm_head": ["forward"], "*": []}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dictionary_json_and_copy_round_trip(config):
    assert QFTConfig.from_dict(config.to_dict()) == config
    assert QFTConfig.from_dict(config.to_diff_dict()) == config
    assert QFTConfig.from_dict(json.loads(config.to_json_string())) == config
    assert copy.deepcopy(config) == config


def test_defaults_are_those_of_the_specification():
    values = QFTConfig().to_dict()

    assert values.pop("quant_method") == "qft"
    assert values == {k: v for k, v in vars(QuantizationSpec()).items() if k != "strict"}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_json_keeps_every_value(config, tmp_path):
    quantize_model_(tiny_llama(), config).config.save_pretrained(tmp_path)

    read = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert isinstance(read, dict)
    assert AutoQuantizationConfig.from_dict(read) == config


def test_arguments_win_over_the_dictionary_and_the_rest_comes_back():
    config, unused = QFTConfig.from_dict(
        {"seed": 1, "group_size": 32}, return_unused_kwargs=True, seed=2, revision="main"
    )

    assert config == QFTConfig(seed=2, group_size=32)
    assert unused == {"revision": "main"}


def test_unknown_name_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"no groupsize; its names are group_size, outlier_frac"):
        QFTConfig.from_dict({"groupsize": 64, "seed": 1})


def test_other_quantization_method_is_refused():
    with pytest.raises(ValueError, match="quant_method='qft', got 'gptq'"):
        QFTConfig.from_dict({"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"group_size": "64"}, "group_size must be an integer or None, got '64'"),
        ({"group_size": True}, "group_size must be an integer or None, got True"),
        ({"outlier_fraction": "0.01"}, "outlier_fraction must be a number"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of module names or None"),
        ({"modules_to_not_convert": [3]}, "must be a list of module names or None"),
        ({"modules_to_not_convert": [""]}, "must be a list of module names or None"),
        ({"matmul": None}, "matmul must be a string"),
        ({"seed": 1.5}, "seed must be an integer"),
    ],
)
def test_wrong_type_is_refused_before_its_range(values, text):
    with pytest.raises(TypeError, match=text):
        QFTConfig(**values)


def test_value_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        QFTConfig.from_dict({"outlier_fraction": 1.0})


def test_another_storage_format_cannot_be_assigned():
    config = QFTConfig(group_size=64)

    config.storage_format = QFTConfig(group_size=64, seed=5).storage_format
    with pytest.raises(ValueError, match=r"with group_size=64, and group_size=None was asked for"):
        config.storage_format = QFTConfig().storage_format
