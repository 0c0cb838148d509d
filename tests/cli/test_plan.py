"""`qft-hf plan` reports the estimate for each way and each card."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from qft_hf import (
    QFTConfig,
    QSTConfig,
    attach_side_network,
    estimate_memory,
    estimate_side_memory,
    quantize_model_,
    recommend,
)
from qft_hf.hf import shipped
from qft_hf.hf.language_model import freeze_non_text_parts
from qft_hf_cli import main
from tests.models import tiny_llama
from tests.scripts.commands import load


@pytest.fixture
def folder(tmp_path):
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def plan(result_of):
    return partial(result_of, "plan")


def test_every_way_has_the_bytes_of_the_estimate(folder, plan):
    flags = ["--sequence_length=300", "--batch_size=3", "--optim=qft_adamw", "--chunked_loss"]
    (result,) = plan(folder, *flags, "--matmul=int8", "--gpu=1")

    work = {
        "sequence_length": 300,
        "batch_size": 3,
        "optimizer": "qft_adamw",
        "chunked_loss": True,
        "config": QFTConfig(matmul="int8"),
    }
    assert len(result["ways"]) == 4
    for way in result["ways"]:
        keys = ("gradient", "gradient_checkpointing")
        expected = estimate_memory(folder, **{key: way[key] for key in keys}, **work)
        assert way["state_bytes"] == expected.state_bytes
        assert way["total_bytes"] == expected.total_bytes
    assert result["cards"][0]["text"] == str(recommend(folder, 1, **work))


def test_the_text_says_which_card_holds_which_way(folder, capsys, plan):
    """Only release with checkpointing fits 0.003 GB."""
    sizes = sorted(way["total_bytes"] for way in plan(folder)[0]["ways"])
    between = (sizes[0] + sizes[1]) / 2 / 0.92 / 1e9
    main(["plan", folder, "--gpu", str(between), "80"])

    lines = capsys.readouterr().out.splitlines()
    ways = {tuple(line.split()[:2]): line.split()[-2:] for line in lines[3:7]}
    assert [way for way, fits in ways.items() if fits[0] == "fits"] == [("release", "on")]
    assert all(fits[1] == "fits" for fits in ways.values())


def test_a_model_that_sees_is_planned_and_another_that_says_nothing_refused(
    tmp_path, capsys, refused
):
    families = load("families").TINY
    for name in ("Qwen2.5-VL", "ViT"):
        families[name].config().save_pretrained(tmp_path / name)

    main(["plan", str(tmp_path / "Qwen2.5-VL")])
    assert "without the activations of vision" in capsys.readouterr().out

    assert "qft-hf plan: A causal language model is needed" in refused("plan", tmp_path / "ViT")


def test_an_architecture_that_ships_is_known_by_name_from_any_folder(tmp_path, monkeypatch, plan):
    monkeypatch.chdir(tmp_path)
    (result,) = plan("llama-2-7b")
    assert result["model"] == "llama-2-7b"
    assert result["parameters"] == 6_738_415_616
    assert shipped.architecture("llama-3-8b") is not None


def test_a_config_says_how_long_and_how_many(folder, tmp_path, plan):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ntrain_data: t.jsonl\nmax_length: 48\nuse_cpu: true\n"
        "per_device_train_batch_size: 5\nmomentum_bits: 4\nmatmul: int8\nchunked_loss: true\n"
    )
    (result,) = plan(config)

    assert (result["batch_size"], result["sequence_length"]) == (5, 48)
    expected = estimate_memory(
        folder,
        batch_size=5,
        sequence_length=48,
        momentum_bits=4,
        chunked_loss=True,
        config=QFTConfig(matmul="int8"),
        gradient_checkpointing=False,
    )
    assert result["ways"][0]["total_bytes"] == expected.total_bytes
    text = config.read_text().replace("chunked_loss", "use_liger_kernel")  # which comes with one
    config.write_text(text)
    assert plan(config)[0]["ways"][0]["total_bytes"] == expected.total_bytes
    (longer,) = plan(config, "--sequence_length=64")
    assert longer["sequence_length"] == 64


def test_a_config_for_a_gpu_is_planned_without_one(folder, tmp_path, plan, monkeypatch):
    """`bf16: true`, as in a config that ships, was refused on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tmp_path / "run.yaml"
    text = f"model_name_or_path: {folder}\ntrain_data: t.jsonl\n"
    config.write_text(text)
    (expected,) = plan(config)
    config.write_text(text + "bf16: true\ncuda_graph: true\nuse_cpu: false\n")
    (result,) = plan(config)
    assert result == expected


def test_a_flag_overrides_its_own_key_of_a_config_and_no_other(folder, tmp_path, plan):
    """--matmul once replaced the whole format of the weights."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ntrain_data: t.jsonl\nmax_length: 48\nuse_cpu: true\n"
        "outlier_fraction: 0.1\nmodules_to_not_convert: [lm_head]\n"
    )
    (result,) = plan(config, "--matmul=int8")

    config = QFTConfig(outlier_fraction=0.1, modules_to_not_convert=["lm_head"], matmul="int8")
    for way in result["ways"]:
        mode = {key: way[key] for key in ("gradient", "gradient_checkpointing")}
        expected = estimate_memory(folder, batch_size=8, sequence_length=48, config=config, **mode)
        assert way["state_bytes"] == expected.state_bytes
        assert way["total_bytes"] == expected.total_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("keys", "estimate"),
    [
        ("", estimate_memory),
        ("method: qst\nside_r: 4\n", partial(estimate_side_memory, side=QSTConfig(r=4))),
    ],
    ids=["full", "qst"],
)
def test_the_dtype_is_that_of_the_run(keys, estimate, dtype, tmp_path, plan):
    """It was that of the model's configuration, though a run loads what it is told, or FP32."""
    model = tiny_llama(max_position_embeddings=64).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tmp_path}/model\ntrain_data: t.jsonl\nmax_length: 32\n"
        f"use_cpu: true\n{keys}" + ("dtype: bfloat16\n" if dtype == "bfloat16" else "")
    )
    (result,) = plan(config)

    model.config.dtype = getattr(torch, dtype)
    for way in result["ways"]:
        names = {"gradient", "base", "gradient_checkpointing"} & way.keys()
        of_way = {name: way[name] for name in names}
        expected = estimate(model.config, batch_size=8, sequence_length=32, **of_way)
        assert way["activation_bytes"] == expected.activation_bytes
        assert way["state_bytes"] == expected.state_bytes


def test_a_config_of_labelled_texts_is_refused(folder, tmp_path, refused):
    """Computed for a language model, the memory would be too large by all the logits."""
    config = tmp_path / "labels.yaml"
    config.write_text(f"model_name_or_path: {folder}\ntrain_data: x.jsonl\ntask: regression\n")
    assert "has task 'regression', but memory is estimated only for" in refused("plan", config)


def test_several_gpus_have_the_bytes_of_each_and_the_command_that_starts_them(folder, capsys, plan):
    words = [folder, "--gpu=0.01", "--sequence_length=300"]
    (result,) = plan(*words, "--gpus=3")

    work = {"sequence_length": 300, "n_processes": 3}
    expected = estimate_memory(folder, gradient="release", **work)
    (way,) = (w for w in result["ways"][2:] if w["gradient"] == "release")
    assert way["total_bytes"] == expected.total_bytes
    assert result["gpus"] == 3
    assert result["received_bytes"] == expected.received_bytes
    assert result["cards"][0]["text"] == str(recommend(folder, 0.01, **work))
    command = "accelerate launch --multi_gpu --num_processes 3 -m qft_hf finetune my.yaml"
    assert result["command"] == command

    main(["plan", *words, "--gpus=3"])
    text = capsys.readouterr().out
    assert "by arithmetic, on each of 3 GPUs" in text
    assert "3 x 0.01 GB" in text
    assert command in text

    (alone,) = plan(*words)
    assert alone["command"] == "python -m qft_hf finetune my.yaml"
    main(["plan", *words, "--gpus=3", "--markdown"])
    assert "states, `release`, each of 3" in capsys.readouterr().out


def test_the_command_names_the_config_that_was_asked_about(folder, tmp_path, plan):
    config = tmp_path / "run.yml"
    config.write_text(f"model_name_or_path: {folder}\ntrain_data: t.jsonl\nuse_cpu: true\n")
    (result,) = plan(config, "--gpus=2")
    assert result["command"].endswith(f"--num_processes 2 -m qft_hf finetune {config}")


def test_a_side_network_is_planned_for_each_way_to_store_its_base(folder, tmp_path, capsys, plan):
    flags = ["--method=qst", "--side_r=11", "--sequence_length=50"]
    (result,) = plan(folder, *flags, "--gpu=1")

    side = QSTConfig(r=11)
    assert [way["base"] for way in result["ways"]] == [
        "float",
        "float",
        "int8",
        "int8",
        "nf4",
        "nf4",
    ]
    for way in result["ways"]:
        keys = ("base", "gradient_checkpointing")
        named = {key: way[key] for key in keys}
        expected = estimate_side_memory(folder, side, sequence_length=50, **named)
        assert way["state_bytes"] == expected.state_bytes
        assert way["total_bytes"] == expected.total_bytes
    assert result["cards"][0]["base"] == "float"
    assert result["cards"][0]["text"] == str(recommend(folder, 1, 50, side=side))

    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ntrain_data: t.jsonl\nmax_length: 50\nuse_cpu: true\n"
        "method: qst\nside_r: 11\nbase: int8\nper_device_train_batch_size: 1\n"
    )
    (of_config,) = plan(config, "--gpu=1")
    assert of_config["ways"] == result["ways"][2:4]
    main(["plan", folder, *flags, "--markdown"])
    assert "in all, nf4 base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=qst", "--optim=qft_lion"], "--optim is for training every parameter"),
        (["--side_r=4"], "side_r can only be set for side tuning"),
        (["--method=qst", "--base=int4"], "base must be 'nf4' or 'int8' or 'float', got 'int4'"),
    ],
)
def test_flags_of_the_other_method_are_refused(flags, message, folder, refused):
    assert message in refused("plan", folder, *flags)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(max_position_embeddings=512),
        LlamaConfig(
            max_position_embeddings=128, rope_parameters={"rope_type": "linear", "factor": 4.0}
        ),
        GPT2Config(n_positions=512),
    ],
    ids=["positions", "scaled", "gpt2"],
)
def test_more_tokens_than_the_model_has_positions_do_not_fit_any_card(
    config, tmp_path, refused, plan
):
    """The plan once said "fits", also of the default 2,048 tokens, and the run was refused."""
    config.save_pretrained(tmp_path)
    (unasked,) = plan(tmp_path)
    (longest,) = plan(tmp_path, "--sequence_length=512")
    assert unasked == longest
    assert (longest["sequence_length"], longest["positions"]) == (512, 512)
    assert "fits, with sequences of up to the model's 512 tokens" in longest["cards"][0]["text"]
    assert {card["longest_sequence"] for card in longest["cards"]} == {512}

    assert re.search(
        r"of 513 tokens .* has 512 positions\. Set .* 512 or",
        refused("plan", tmp_path, "--sequence_length=513"),
    )


def test_a_config_that_is_too_long_for_its_model_is_refused(tmp_path, folder, refused):
    config = tmp_path / "my.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ntrain_data: x.jsonl\noutput_dir: run\nmax_length: 4097\n"
    )
    assert "has 4,096 positions" in refused("plan", config)


@pytest.mark.parametrize("gpu", ["0", "-1", "nan", "inf"])
def test_a_card_has_some_memory(gpu, refused):
    """The error named an argument of a Python function."""
    error = refused("plan", "gpt2", "--gpu", "24", gpu, status=2)
    assert f"--gpu must be a positive, finite number of GB, got {gpu}" in error


@pytest.mark.parametrize("flag", ["--gpus", "--batch_size", "--sequence_length"])
def test_numbers_are_refused_by_their_flags(flag, refused):
    """`--gpus` was called `n_processes`."""
    assert f"{flag} must be 1 or more, got 0" in refused("plan", "gpt2", flag, "0", status=2)


@pytest.mark.parametrize("flag", ["--optim=qft_sgd", "--matmul=int8", "--gpus=2", "--chunked_loss"])
def test_flags_of_full_training_are_refused_for_a_config_with_a_side_network(
    flag, folder, tmp_path, refused
):
    """They were ignored."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ntrain_data: t.jsonl\nuse_cpu: true\n"
        "method: qst\nside_r: 4\n"
    )
    error = refused("plan", config, flag)
    assert f"{flag.partition('=')[0]} is for training every parameter" in error
    assert "run.yaml is planned with a side network" in error


def test_another_method_is_not_taken_for_training_all_parameters(folder, refused):
    assert "invalid choice: 'qlora'" in refused("plan", folder, "--method", "qlora", status=2)


def test_an_int8_folder_is_planned_in_its_own_format(folder, tmp_path, plan):
    """The default format was once assumed."""
    config = QFTConfig(outlier_fraction=0.1, modules_to_not_convert=["lm_head"])
    saved = str(tmp_path / "int8")
    quantize_model_(tiny_llama(tied=False), config).save_pretrained(saved)
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {saved}\ntrain_data: t\nuse_cpu: true\n"
    )

    for matmul in ([], ["--matmul=int8"]):
        (of_folder,) = plan(saved, *matmul, "--sequence_length=32")
        words = [str(tmp_path / "my.yaml"), *matmul, "--sequence_length=32"]
        (of_config,) = plan(*words, "--batch_size=1")
        form = replace(config, matmul="int8") if matmul else config
        expected = estimate_memory(
            saved, config=form, sequence_length=32, gradient_checkpointing=False
        )
        assert of_folder["ways"][0]["total_bytes"] == expected.total_bytes
        assert of_config["ways"] == of_folder["ways"]


def test_the_base_of_a_side_network_that_is_int8_stays_so(tmp_path, plan):
    """`qft-hf plan` proposed a float base, which a run then refused."""
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path / "int8")
    place = str(tmp_path / "int8")

    (result,) = plan(place, "--gpu=1", "--method=qst", "--side_r=2")

    assert [way["base"] for way in result["ways"]] == ["int8", "int8"]
    assert result["cards"][0]["base"] == "int8"
    with pytest.raises(ValueError, match=r"base=nf4 was asked for, .* in int8\. Leave base out"):
        recommend(place, 1, 50, side=QSTConfig(r=2), base="nf4")


def test_a_folder_of_a_side_network_says_what_to_plan(tmp_path, refused):
    attach_side_network(tiny_llama(), QSTConfig(r=2)).save_pretrained(tmp_path)

    text = refused("plan", tmp_path, "--gpu=1")

    assert "holds a side network without the model" in text
    assert "Name that model, and give --method qst" in text


def test_parts_that_text_does_not_reach_are_planned_as_a_run_trains_them(tmp_path, plan):
    model = load("families").OF_IMAGES_AND_SOUND["LLaVA"].model()
    model.config.save_pretrained(tmp_path)
    (result,) = plan(tmp_path, "--sequence_length=32")

    freeze_non_text_parts(model, model.config)
    expected = estimate_memory(model, sequence_length=32, gradient_checkpointing=False)
    everything = estimate_memory(model.config, sequence_length=32, gradient_checkpointing=False)
    assert result["ways"][0]["total_bytes"] == expected.total_bytes < everything.total_bytes
