"""Runs that train a side network: from arguments to the output folder, and back."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BitsAndBytesConfig,
    OPTConfig,
    OPTForCausalLM,
)

from qft_hf import (
    QFTWeight,
    QSTConfig,
    attach_side_network,
    load_side_network,
    side_parameters,
)
from qft_hf.hf.finetune import finetune, prepare
from qft_hf.hf.finetune.check import check
from qft_hf.hf.finetune.side_tuning import side_checkpoint
from qft_hf.hf.report import page, read_run
from qft_hf_cli import main
from tests.finetune.chats import tiny_tokenizer
from tests.finetune.flags import as_flags, leave_run, parsed, write_jsonl
from tests.models import tiny_bert, tiny_llama

# On a CPU bitsandbytes needs rows in multiples of 32 and columns in multiples of 64.
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags of a run of four steps on a few conversations, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(**SIZES).save_pretrained("model")
    return leave_run(Path(), method="qst", side_r=4, learning_rate=0.02)


@pytest.mark.parametrize("base", ["nf4", "int8", "float"])
def test_a_run_leaves_the_side_network_alone_and_tells_the_truth_about_it(base, flags, result_of):
    summary = finetune(parsed(flags, base=base))

    run = Path("run")
    assert summary.after["loss"] < summary.before["loss"]
    written = json.loads((run / "summary.json").read_text())
    assert written["side"] == {"r": 4, "downsample": "adapter", "rank": 16, "base": base}
    float_size = sum(p.numel() for p in tiny_llama(**SIZES).parameters())
    assert summary.parameters - summary.trained_parameters == float_size
    assert f"{summary.trained_parameters:,} of {summary.parameters:,} parameters" in str(summary)
    assert not (run / "config.json").exists()
    assert not (run / "model.safetensors").exists()
    assert (run / "side_network.safetensors").stat().st_size < 4 * summary.trained_parameters + 8192
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    kinds = {"nf4": "NF4 weights", "int8": "INT8 weights", "float": "float parameters"}
    assert kinds[base] in summary.state_bytes
    assert summary.state_bytes["side network"] == 4 * summary.trained_parameters
    assert summary.state_bytes["gradients"] == 4 * summary.trained_parameters
    assert summary.state_bytes["momentum"] == 8 * summary.trained_parameters

    card = (run / "README.md").read_text()
    assert f"A side network of {summary.trained_parameters:,} parameters beside a local" in card
    assert "arXiv:2401.07159" in card
    assert "parameters were trained, in INT8" not in card
    assert "PyTorch's AdamW" in card
    assert 'qft_hf.load_side_network(model, "run")' in card
    report = page([read_run(run)])
    assert "Nothing was sampled" in report
    assert f"M: a side network, base in {base}" in report

    scores = result_of("evaluate", "run")["scores"]
    assert scores["loss"] == pytest.approx(summary.after["loss"], rel=1e-5)
    main(["chat", "run", "--prompt", "how are you?", "--max_new_tokens", "3"])


def test_the_folder_loads_beside_its_base_and_no_other(flags):
    finetune(parsed(flags, base="float"))
    model = load_side_network(AutoModelForCausalLM.from_pretrained("model"), "run")
    assert all(p.isfinite().all() for p in side_parameters(model).values())
    other = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="another version"):
        load_side_network(other, "run")


def test_a_run_goes_on_from_the_side_network_of_another(flags):
    first = finetune(parsed(flags))
    again = finetune(parsed(flags, model_name_or_path="run", output_dir="second"))
    assert again.before == first.after
    assert again.side == first.side

    flags |= {"model_name_or_path": "run", "output_dir": "third"}
    another = r"QSTConfig\(r=8.*run holds QSTConfig\(r=4.*name the base"
    for command in (check, prepare):  # a check once accepted it
        with pytest.raises(ValueError, match=another):
            command(parsed(flags, side_r=8))
    del flags["method"], flags["side_r"]
    with pytest.raises(ValueError, match=r"run holds a side network.*Set method to qst"):
        prepare(parsed(flags))


def put_on_hub(cache, name, **models):
    """Write models into the cache of the Hub, one for each revision of `name`."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for commit, (revision, model) in zip(("1" * 40, "2" * 40), models.items(), strict=True):
        (folder / "refs" / revision).write_text(commit)
        model.save_pretrained(folder / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(folder / "snapshots" / commit)


def test_the_base_has_the_revision_that_the_side_network_was_trained_on(
    flags, tmp_path, monkeypatch, result_of
):
    """That of the main branch was loaded, and refused as another version of the base."""
    old, new = tiny_llama(**SIZES), tiny_llama(**SIZES)
    torch.nn.init.constant_(new.model.norm.weight, 2)
    put_on_hub(tmp_path / "hub", "org/base", v1=old, main=new)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    flags |= {"model_name_or_path": "org/base", "base": "float"}
    first = finetune(parsed(flags, model_revision="v1"))

    main(["chat", "run", "--prompt", "how are you?", "--max_new_tokens", "2"])
    scores = result_of("evaluate", "run")["scores"]
    assert scores["loss"] == pytest.approx(first.after["loss"], rel=1e-5)
    second = finetune(parsed(flags, model_name_or_path="run", output_dir="second"))
    third = prepare(parsed(flags, model_name_or_path="second", output_dir="third"))
    assert second.before == first.after
    assert torch.equal(third.trainer.model.model.norm.weight, old.model.norm.weight)
    with pytest.raises(ValueError, match="another version of org/base"):
        prepare(parsed(flags, model_name_or_path="run", output_dir="third", model_revision="main"))


@pytest.mark.parametrize("folder", ["model", "run"])
def test_a_dry_run_misses_weights_of_the_base_and_of_the_side_network(folder, flags):
    """It read those of the side network alone."""
    finetune(parsed(flags, base="float"))
    again = {"model_name_or_path": "run", "base": "float", "output_dir": "second"}
    check(parsed(flags, **again))
    (weights,) = Path(folder).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    for command in (check, prepare):
        with pytest.raises(ValueError, match=f"{weights}.*is damaged"):
            command(parsed(flags, **again))


def test_a_classifier_keeps_its_classes_in_the_folder_of_its_side_network(flags, result_of):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    tiny_bert(vocab_size=320, **sizes).base_model.save_pretrained("encoder")
    tiny_tokenizer().save_pretrained("encoder")
    labels = ["so so", "good", "bad"]
    rows = [{"text": f"the fox {n}", "label": labels[n % 3]} for n in range(12)]
    write_jsonl(Path("train.jsonl"), rows)
    write_jsonl(Path("eval.jsonl"), rows)
    changes = {"model_name_or_path": "encoder", "task": "classification", "max_length": 16}
    summary = finetune(parsed(flags, **changes))
    assert summary.architecture == "BertForSequenceClassification"
    assert set(summary.after) == {"loss", "accuracy"}

    # The held-out rows have two of the classes, whose numbers are still those of the head.
    write_jsonl(Path("few.jsonl"), [row for row in rows if row["label"] != "bad"])
    few = result_of("evaluate", "run", "--eval_data", "few.jsonl")["scores"]
    write_jsonl(Path("rest.jsonl"), [row for row in rows if row["label"] == "bad"])
    everything = result_of("evaluate", "run", "--eval_data", "few.jsonl", "rest.jsonl")["scores"]
    assert everything["loss"] == pytest.approx(summary.after["loss"], rel=1e-5)
    assert few["loss"] != everything["loss"]


def test_weights_that_the_base_lacks_are_not_drawn_at_random_and_frozen(flags):
    """A pooler was once drawn again at each load, so an evaluation scored another model."""
    config = tiny_bert(vocab_size=320, num_attention_heads=2, hidden_size=64).config
    BertForMaskedLM(config).save_pretrained("model")
    rows = [{"text": f"word {n}", "label": "abc"[n % 3]} for n in range(9)]
    write_jsonl("train.jsonl", rows)
    values = {name: value for name, value in flags.items() if name != "eval_data"}
    asked = parsed(values, task="classification", base="int8")
    with pytest.raises(
        ValueError, match=r"bert\.pooler\.dense\.bias and 1 more\. .* Set method to full"
    ):
        prepare(asked)


def test_a_side_network_in_int8_is_trained_by_an_optimizer_of_ours(flags):
    summary = finetune(parsed(flags, base="float", optim="qft_lion"))
    assert summary.after["loss"] != summary.before["loss"]
    assert summary.optimizer.startswith("Lion")
    assert summary.state_bytes["side network"] < 4 * summary.trained_parameters
    model = load_side_network(AutoModelForCausalLM.from_pretrained("model"), "run")
    assert any(isinstance(p, QFTWeight) for p in side_parameters(model).values())
    assert not any(isinstance(p, QFTWeight) for p in model.model.parameters())


def test_resuming_ends_like_the_straight_run(flags):
    values = flags | {"save_strategy": "steps", "save_steps": 2}
    straight = finetune(parsed(values))
    names = sorted(path.name for path in Path("run/checkpoint-2").iterdir())
    assert "side_network.safetensors" in names
    assert "model.safetensors" not in names
    for path in Path("run").glob("side_network.*"):
        path.unlink()
    Path("run/summary.json").unlink()
    resumed = finetune(parsed(values, resume_from_checkpoint="run/checkpoint-2"))
    assert resumed.after == straight.after


def test_packed_examples_see_each_other_neither_in_the_base_nor_beside_it(flags):
    """The base runs without autograd, where the check for crossing once ended in a traceback."""
    run = prepare(parsed(flags, base="int8", packing="true"))
    model, block = run.trainer.model, run.data.train.dataset[0]
    with torch.no_grad():
        model.side_network.upsample.normal_()
    model.eval()
    second = block["position_ids"].index(0, 1)

    def logits(first_token):
        ids = torch.tensor([[first_token, *block["input_ids"][1:]]])
        positions = torch.tensor([block["position_ids"]])
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]

    one, other = logits(5), logits(6)
    assert not torch.equal(one[:second], other[:second])
    assert torch.equal(one[second:], other[second:])
    assert finetune(parsed(flags, packing="true", base="float")).steps == 4

    OPTForCausalLM(
        OPTConfig(vocab_size=320, hidden_size=64, ffn_dim=64, num_hidden_layers=2,
                  num_attention_heads=2, word_embed_proj_dim=64, max_position_embeddings=64)
    ).save_pretrained("opt")  # fmt: skip
    tiny_tokenizer().save_pretrained("opt")
    with pytest.raises(ValueError, match="OPTForCausalLM does not keep them apart"):
        prepare(parsed(flags, model_name_or_path="opt", packing="true", output_dir="run-2"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_says_what_would_be_trained_and_what_it_takes(dtype, flags, capsys, result_of):
    """The configuration of the base names float32: what counts is the dtype of the run."""
    found = result_of("check", *as_flags(flags | {"base": "int8", "dtype": dtype}))
    summary = finetune(parsed(flags, base="int8", dtype=dtype))
    assert found["parameters"] == summary.parameters
    assert found["trained_parameters"] == summary.trained_parameters
    rows = {row["state"]: row["bytes"] for row in found["memory"]["rows"]}
    assert rows.items() >= {(n, s) for n, s in summary.state_bytes.items() if n != "buffers"}
    assert found["disk_bytes"] == 4 * summary.trained_parameters
    main(["check", *as_flags(flags | {"output_dir": "other"})])
    text = capsys.readouterr().out
    assert f"a side network of {summary.trained_parameters:,} parameters" in text
    assert "NF4 weights" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": "release"}, "gradient is only for training every.*Leave gradient out"),
        ({"clipping": "tensor"}, "clipping is only for training every parameter"),
        ({"matmul": "int8"}, "matmul is only for training every parameter.*default format"),
        ({"chunked_loss": "true"}, "chunked_loss is only for training every.*frozen base"),
        ({"new_tokens": "<a>"}, "new_tokens is only for training every.*learn nothing"),
        ({"export_dtype": "float32"}, "export_dtype is only for training every parameter"),
        (
            {"side_rank": 4, "side_downsample": "mean"},
            "side_rank=4 needs side_downsample 'adapter'",
        ),
        ({"side_downsample": "median"}, "downsample must be 'adapter' or 'linear'"),
        ({"method": "full"}, "side_r can only be set for side tuning.*Set method to qst"),
        ({"method": "full", "base": "nf4"}, "side_r, base can only be set for side tuning"),
    ],
)
def test_contradictions_are_refused_before_a_model_is_looked_for(changes, message, flags):
    with pytest.raises(ValueError, match=message):
        parsed(flags, **changes)


def test_another_optimizer_needs_a_rate_of_its_own(flags):
    del flags["learning_rate"]
    assert parsed(flags).training.learning_rate == 1e-3
    assert parsed(flags).training.optim == "adamw_torch"
    with pytest.raises(ValueError, match=r"starts from random.*Set learning_rate"):
        parsed(flags, optim="qft_lion")


@pytest.mark.parametrize("act", [check, finetune])
def test_what_our_optimizers_cannot_do_is_refused_by_a_check_too(act, flags):
    ours = {"optim": "qft_lion", "learning_rate": 1e-3, "base": "float"}
    act(parsed(flags, **ours, output_dir="other"))
    with pytest.raises(ValueError, match="gradient='release' is for training all parameters"):
        act(parsed(flags, **ours, optim_args="gradient=release", max_grad_norm=0))
    with pytest.raises(ValueError, match=r"fp16=True.*Use bf16=True"):
        act(parsed(flags, **ours, fp16="true"))


def test_nf4_without_bitsandbytes_is_refused_before_anything_is_read(flags, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    error = refused("finetune", *as_flags(flags))
    assert "pip install 'bitsandbytes" in error
    assert not Path("run").exists()
    assert finetune(parsed(flags, base="int8")).steps == 4


@pytest.mark.parametrize("command", ["check", "finetune"])
def test_a_width_that_r_does_not_divide_names_the_nearest(command, flags, refused):
    assert re.search(
        r"r=12 does not divide .* 64.*nearest r that does is",
        refused(command, *as_flags(flags | {"side_r": 12, "base": "float"})),
    )


def test_a_base_that_is_quantized_stays_so_and_another_format_is_refused(flags):
    from qft_hf import QFTConfig

    int8 = AutoModelForCausalLM.from_pretrained("model", quantization_config=QFTConfig())
    int8.save_pretrained("int8")
    tiny_tokenizer().save_pretrained("int8")
    with pytest.raises(ValueError, match=r"base=nf4 was asked for, but .* already stored in int8"):
        prepare(parsed(flags, model_name_or_path="int8", base="nf4"))
    assert finetune(parsed(flags, model_name_or_path="int8")).side["base"] == "int8"


@pytest.mark.parametrize(
    ("form", "stored"),
    [
        ({"load_in_8bit": True}, "bitsandbytes int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
    ],
    ids=["8 bit", "fp4"],
)
def test_a_base_in_another_format_of_bitsandbytes_is_not_taken_for_nf4(
    form, stored, flags, refused
):
    """Evaluating loaded a float base as NF4, and a run said that its base was NF4.

    A run on a base of any other method, such as GPTQ, failed when it wrote its card.

    Tests loaded bases in NF4 alone, the only format of bitsandbytes that a run makes.
    """
    quantized = BitsAndBytesConfig(**form)
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=quantized)
    model.save_pretrained("stored")
    tiny_tokenizer().save_pretrained("stored")
    attach_side_network(model, QSTConfig(r=4)).save_pretrained("side")
    tiny_tokenizer().save_pretrained("side")

    assert re.search(
        f"a base that {stored} has quantized. Load the base",
        refused("evaluate", "side", "--eval_data", "eval.jsonl"),
    )
    with pytest.raises(ValueError, match=f"base=nf4 was asked .* already stored in {stored}"):
        prepare(parsed(flags, model_name_or_path="stored", base="nf4"))
    assert finetune(parsed(flags, model_name_or_path="stored")).side["base"] == stored
    assert f"stayed frozen, stored as {stored}, and" in Path("run/README.md").read_text()
    main(["evaluate", "run"])


def test_a_base_that_has_gone_is_named(flags, refused):
    finetune(parsed(flags, base="float", save_strategy="steps", save_steps=1))
    Path("model").rename("moved")
    model = Path("model").absolute()  # known from any folder, while it is there
    for folder in ("run", "run/checkpoint-1"):  # a checkpoint has no settings of its own
        error = refused("chat", folder, "--prompt", "hi")
        assert f"side network of {model}, which is neither here" in error
        assert "set model_name_or_path in run/run.yaml to the place of the base" in error.replace(
            f"{Path.cwd()}/", ""
        )
    shutil.copytree("run/checkpoint-1", "alone")
    place = Path("alone/side_network.json")
    assert f"set base.name in {place} to" in refused("chat", "alone", "--prompt", "hi")

    settings, said = Path("run/run.yaml"), json.loads(place.read_text())  # do what the errors say
    settings.write_text(settings.read_text().replace(f"{model}\n", "moved\n"))
    said["base"]["name"] = "moved"
    place.write_text(json.dumps(said))
    for folder in ("run", "run/checkpoint-1", "alone"):
        main(["chat", folder, "--prompt", "hi", "--max_new_tokens", "2"])


def test_a_base_without_a_name_is_not_taken_for_the_working_directory(tmp_path, monkeypatch):
    """Reading the side network in its own folder once ended in a RecursionError."""
    attach_side_network(tiny_llama(), QSTConfig(r=2)).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert side_checkpoint(".").base == ""


def test_what_has_no_meaning_for_a_side_network_says_so(flags, refused):
    finetune(parsed(flags, base="float"))
    for command, message in (
        (["export", "run", "plain", "--dtype", "bfloat16"], "no ordinary checkpoint of both"),
        (["inspect", "run"], "not the weights of its base. Inspect the base"),
    ):
        assert message in refused(*command)
