"""Side networks in Trainers, in files, and in other processes."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qft_hf import (
    QFTConfig,
    QFTLion,
    QFTTrainer,
    QFTTrainingArguments,
    dequantize_model_,
    load_side_network,
    quantize_model_,
    save_side_network,
)
from qft_hf.hf.compatibility import quantization_config_of
from qft_hf.hf.side_network import _config_hash
from qft_hf.hf.tensor_files import metadata
from qft_hf.quant import QFTWeight
from qft_hf.side import QSTConfig, attach_side_network, side_network_of, side_parameters
from scripts.common.tiny_models import TINY
from tests.finetune.chats import TEXTS, tiny_tokenizer
from tests.fresh import run_fresh
from tests.side.families import classifier, decoder, texts, wide_decoder
from tests.side.test_families import disturbed_, logits
from tests.side.test_network import bytes_saved
from tests.tolerances import assert_same_bits

CONFIG = QSTConfig(r=4, rank=4)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A saved float base, in sizes that bitsandbytes supports."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    wide_decoder().save_pretrained(folder)
    return folder


def base_of(kind, folder):
    if kind == "int8":
        return quantize_model_(AutoModelForCausalLM.from_pretrained(folder), QFTConfig())
    if kind == "nf4":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)
    return AutoModelForCausalLM.from_pretrained(folder)


def frozen_bits(model):
    """Return copies of the tensors that the base stores, whatever its format."""
    own = side_parameters(model).keys()
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in own and isinstance(tensor, torch.Tensor) and "side_network." not in name
    }


def arguments(folder, kind=TrainingArguments, **settings):
    return kind(
        folder,
        **{
            "max_steps": 4, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none",
            "use_cpu": True, "save_steps": 2, "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2, **settings,
        },
    )  # fmt: skip


def rows(n=16):
    """Return two texts again and again, so that four steps learn them."""
    ids = texts(2, 12, seed=3)
    return [{"input_ids": row, "labels": row} for row in ids] * (n // 2)


RUNS = [
    # trainer, optimizer, base, bf16
    (Trainer, "adamw_torch", "float", False),
    (Trainer, "adamw_torch", "nf4", True),
    (Trainer, "qft_lion", "int8", False),
    (QFTTrainer, "adamw_torch", "int8", True),
    (QFTTrainer, "qft_lion", "nf4", False),
    (QFTTrainer, "qft_adamw", "float", True),
]
CHECKPOINTED = ("int8", "nf4")  # bases beside which side layers are checkpointed


@pytest.mark.parametrize("way", ["model_init", "optimizer"])
def test_a_side_network_becomes_int8_as_the_stock_trainer_says(way, base_folder, tmp_path):
    """The error named the model, and a base that is stored in 4 bits was then refused."""
    steps = []

    def make():
        model = attach_side_network(base_of("nf4", base_folder), CONFIG)
        for step in steps:
            eval(step, globals() | {"model": model})
        return model

    def train():
        if way == "model_init":
            args = arguments(tmp_path, optim="qft_lion")
            trainer = Trainer(model_init=make, args=args, train_dataset=rows())
        else:
            model = make()
            own = QFTLion(side_parameters(model).values(), lr=0.01)
            args = arguments(tmp_path)
            trainer = Trainer(model, args, train_dataset=rows(), optimizers=(own, None))
        trainer.train()

    with pytest.raises((TypeError, ValueError), match="of SideNetwork is INT8") as refused:
        train()
    steps += re.findall(r"quantize_model_\(.*?\)\)", str(refused.value))
    train()


@pytest.mark.parametrize(("kind", "optim", "base", "bf16"), RUNS)
def test_a_run_trains_the_side_network_alone_and_goes_on_exactly(
    kind, optim, base, bf16, base_folder, tmp_path
):
    def trainer(folder):
        torch.manual_seed(4)
        model = attach_side_network(base_of(base, base_folder), CONFIG)
        settings = QFTTrainingArguments if kind is QFTTrainer else TrainingArguments
        args = arguments(
            folder, settings, optim=optim, bf16=bf16, gradient_checkpointing=base in CHECKPOINTED
        )
        return kind(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))

    whole = trainer(tmp_path / "whole")
    before = frozen_bits(whole.model)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))

    assert losses[-1] < losses[0]
    after = frozen_bits(whole.model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_same_bits(after[name], value)
    for name, parameter in side_parameters(whole.model).items():
        again = side_parameters(resumed.model)[name]
        if isinstance(parameter, QFTWeight):
            for field, value in parameter.fields().items():
                assert_same_bits(again.fields()[field], value)
        else:
            assert_same_bits(again.detach(), parameter.detach())
    network = side_network_of(whole.model)
    assert isinstance(network.layers[0].mlp.up_proj.weight, QFTWeight) == optim.startswith("qft")
    assert whole.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", [Trainer, QFTTrainer])
def test_a_checkpoint_holds_the_side_network_and_no_base(kind, base_folder, tmp_path):
    model = attach_side_network(base_of("float", base_folder), CONFIG)
    args = arguments(
        tmp_path, optim="adamw_torch", max_steps=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = kind(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))

    trainer.train()
    trainer.save_model()

    for folder in (tmp_path / "checkpoint-2", tmp_path):
        names = {path.name for path in folder.iterdir()}
        assert {"side_network.safetensors", "side_network.json"} <= names
        assert not {"model.safetensors", "config.json", "pytorch_model.bin"} & names
    best = load_side_network(base_of("float", base_folder), tmp_path)
    assert_same_bits(logits(best, input_ids=texts()), logits(model, input_ids=texts()))


RELOAD = """
import sys, torch, transformers
from qft_hf import load_side_network
base, folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
load_side_network(model, folder)
ids = torch.tensor([[5, 9, 33, 70]])
torch.save(model(ids).logits, out)
"""


def test_a_fresh_process_computes_the_same(base_folder, tmp_path):
    model = disturbed_(attach_side_network(base_of("float", base_folder), CONFIG))

    model.save_pretrained(tmp_path / "side")
    run_fresh(RELOAD, base_folder, tmp_path / "side", tmp_path / "out")

    expected = logits(model, input_ids=torch.tensor([[5, 9, 33, 70]]))
    assert_same_bits(torch.load(tmp_path / "out").detach(), expected)


def test_an_int8_side_network_is_loaded_as_int8(base_folder, tmp_path):
    model = disturbed_(attach_side_network(base_of("float", base_folder), CONFIG))
    quantize_model_(side_network_of(model), QFTConfig(group_size=5))

    save_side_network(model, tmp_path)
    again = load_side_network(base_of("float", base_folder), tmp_path)

    assert side_network_of(again).layers[0].mlp.up_proj.weight.group_size == 5
    assert_same_bits(logits(again, input_ids=texts()), logits(model, input_ids=texts()))


def test_the_head_of_a_classifier_is_saved_too(tmp_path):
    model = disturbed_(attach_side_network(classifier("BERT"), CONFIG))
    with torch.no_grad():
        model.classifier.weight.add_(1)

    save_side_network(model, tmp_path)
    again = load_side_network(classifier("BERT"), tmp_path)

    assert_same_bits(logits(again, input_ids=texts()), logits(model, input_ids=texts()))


def test_loading_draws_no_random_numbers(base_folder, tmp_path):
    save_side_network(attach_side_network(base_of("float", base_folder), CONFIG), tmp_path)
    base = base_of("float", base_folder)
    state = torch.get_rng_state()

    load_side_network(base, tmp_path)

    assert torch.equal(torch.get_rng_state(), state)


def another_version():
    model = decoder("Llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def other_matrices():
    """Return a model with other matrices and the same norms, as after merging a LoRA."""
    model = decoder("Llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    return model


def wider():
    config = decoder("Llama").config
    config.intermediate_size = 80
    return AutoModelForCausalLM.from_config(config)


def with_another_side():
    return attach_side_network(decoder("Llama"), QSTConfig(r=4, downsample="mean"))


OTHERS = {
    "family": (
        lambda: decoder("Qwen2"),
        "of a LlamaForCausalLM, got Qwen2ForCausalLM",
    ),
    "sizes": (wider, "another LlamaForCausalLM: .* Load the base that it was trained on"),
    "version": (another_version, "another version of .* Load the base that it was trained on"),
    "matrices": (other_matrices, "another version of .*: its weights have other values"),
    "side network": (with_another_side, "Load the base again, or attach one of that configuration"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_base_is_refused_and_stays_as_it_is(kind, tmp_path):
    save_side_network(attach_side_network(decoder("Llama"), CONFIG), tmp_path)
    make, match = OTHERS[kind]
    model = make()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    expected = logits(model, input_ids=texts())

    with pytest.raises(ValueError, match=match):
        load_side_network(model, tmp_path)

    assert before == [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert_same_bits(logits(model, input_ids=texts()), expected)


def test_a_head_for_other_classes_is_refused(tmp_path):
    save_side_network(attach_side_network(classifier("BERT"), CONFIG), tmp_path)
    model = classifier("BERT")
    model.classifier = torch.nn.Linear(48, 7)

    with pytest.raises(ValueError, match="Load the base with the num_labels of the trained head"):
        load_side_network(model, tmp_path)

    assert side_network_of(model) is None


def test_a_head_with_a_buffer_is_saved_and_loaded(tmp_path):
    """It was refused as the head of other classes, because only parameters were looked for."""
    models = [classifier("BERT"), classifier("BERT")]
    for number, model in enumerate(models):
        model.classifier.register_buffer("temperature", torch.tensor(3.0 + number))
    save_side_network(attach_side_network(models[0], CONFIG), tmp_path)

    load_side_network(models[1], tmp_path)

    assert models[1].classifier.temperature == 3.0


def test_a_damaged_file_is_refused(tmp_path):
    save_side_network(attach_side_network(decoder("Llama"), CONFIG), tmp_path)
    path = tmp_path / "side_network.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match=r"is not what was saved\. It is damaged"):
        load_side_network(decoder("Llama"), tmp_path)


def edited(folder, change):
    """Change the tensors and the description in a folder as a valid file may have them."""
    state = load_file(folder / "side_network.safetensors")
    path = folder / "side_network.json"
    said = json.loads(path.read_text())
    change(state, said)
    save_file(state, folder / "side_network.safetensors", metadata(state))
    path.write_text(json.dumps(said))


FOLDERS = {
    "tensor missing": lambda state, said: state.pop("side_network.norm.weight"),
    "gates missing": lambda state, said: state.pop("side_network.gates"),
    "head missing": lambda state, said: state.pop("classifier.bias"),
    "shape": lambda state, said: state.update({"side_network.upsample": torch.zeros(3, 3)}),
    "another's": lambda state, said: state.update({"side_network.extra": torch.zeros(3)}),
    "rank": lambda state, said: said["config"].update(rank=8),
    "format": lambda state, said: said.update(quantization=QFTConfig().to_dict()),
    "option": lambda state, said: said["config"].update(depth=8),
    "base": lambda state, said: said["base"].pop("config_hash"),
    "classes": lambda state, said: said.update(labels={"first": "a"}),
}


@pytest.mark.parametrize("is_passed", [False, True])
def test_a_reference_without_the_side_network_of_the_policy_is_reported(
    is_passed, tmp_path, caplog
):
    """TRL loads a reference from the name in the model's configuration, which is the base's."""
    tokenizer, folder = tiny_tokenizer(), tmp_path / "base"
    base = decoder("Llama")
    base.resize_token_embeddings(max(len(tokenizer), 131))
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = attach_side_network(AutoModelForCausalLM.from_pretrained(folder), CONFIG)
    save_side_network(disturbed_(policy), tmp_path / "side")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    load_side_network(reference, tmp_path / "side")
    rows = [{"prompt": "a", "chosen": " b" * n, "rejected": " c" * n} for n in range(1, 4)]

    trainer = DPOTrainer(
        policy,
        reference if is_passed else None,
        arguments(tmp_path / "run", DPOConfig, max_steps=1, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()

    assert ("pass ref_model=load_side_network(base, folder)" in caplog.text) is not is_passed
    first = next(logs["loss"] for logs in trainer.state.log_history if "loss" in logs)
    assert (abs(first - math.log(2)) < 1e-5) is is_passed


@pytest.mark.parametrize("has_one", [False, True])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_does_not_fit_itself_is_refused_and_the_model_is_unchanged(
    kind, has_one, tmp_path
):
    save_side_network(disturbed_(attach_side_network(classifier(), CONFIG)), tmp_path)
    edited(tmp_path, FOLDERS[kind])
    model = classifier()
    if has_one:
        attach_side_network(model, CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]

    with pytest.raises(ValueError, match=r"copy it again|attach one of that configuration"):
        load_side_network(model, tmp_path)

    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])


@pytest.mark.parametrize("option", ["output_router_logits", "output_hidden_states"])
def test_what_a_run_asks_of_the_base_does_not_make_it_another_one(option, tmp_path):
    trained = decoder("Mixtral")
    setattr(trained.config, option, True)
    save_side_network(disturbed_(attach_side_network(trained, CONFIG)), tmp_path)

    loaded = load_side_network(decoder("Mixtral"), tmp_path)

    ids = texts()
    assert_same_bits(logits(loaded, input_ids=ids), logits(trained, input_ids=ids))


@pytest.mark.parametrize("is_earlier", [False, True])
def test_settings_of_the_text_decoder_do_not_make_it_another_base(is_earlier, tmp_path):
    """`qft-hf chat` refused the side network of a vision-language model that a run had saved.

    The padding token of the tokenizer is set in the configuration of the text decoder, and only the
    fields of the outer configuration were left out of the comparison.
    """
    trained = attach_side_network(TINY["LLaVA"].model(), CONFIG)
    save_side_network(disturbed_(trained), tmp_path)
    if is_earlier:  # a hash of all fields of the inner configurations
        path = tmp_path / "side_network.json"
        said = json.loads(path.read_text())
        said["base"]["config_hash"] = _config_hash(trained.config, nested=False)
        path.write_text(json.dumps(said))
    base = TINY["LLaVA"].model()
    if not is_earlier:
        base.config.text_config.pad_token_id = 7
        base.config.text_config.use_cache = False

    load_side_network(base, tmp_path)

    ids = texts()
    assert_same_bits(logits(base, input_ids=ids), logits(trained, input_ids=ids))
    other = TINY["LLaVA"].model()
    other.config.text_config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match=r"sizes or settings .* Load the base"):
        load_side_network(other, tmp_path)


def test_a_state_dict_that_is_passed_is_what_is_saved(tmp_path):
    model = disturbed_(attach_side_network(classifier(), CONFIG))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}

    model.save_pretrained(tmp_path, state_dict=state)

    saved = load_file(tmp_path / "side_network.safetensors")
    assert saved.keys() == side_parameters(model).keys()
    for name, tensor in saved.items():
        assert_same_bits(tensor, state[name])
    del state["side_network.gates"]
    with pytest.raises(ValueError, match=r"lacks side_network\.gates .* Pass all that"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(torch.rand(3, 3), "multi_label_classification"), (torch.tensor([0, 2, 1]), "single_label")],
)
def test_the_problem_of_a_head_is_that_which_it_was_trained_for(labels, problem, tmp_path):
    """A pipeline reads it: probabilities of several classes are not a softmax."""
    model = attach_side_network(classifier(), CONFIG)
    model(input_ids=texts(), labels=labels).loss.backward()
    save_side_network(model, tmp_path)

    loaded = load_side_network(classifier(), tmp_path)

    assert loaded.config.problem_type == model.config.problem_type
    assert loaded.config.problem_type.startswith(problem)


def test_a_folder_without_one_is_refused_and_says_what_to_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Name a folder that save_side_network"):
        load_side_network(decoder("Llama"), tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    save_side_network(attach_side_network(decoder("Llama"), CONFIG), tmp_path)
    path = tmp_path / "side_network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))

    with pytest.raises(ValueError, match=r"has format 2, .* Install that version"):
        load_side_network(decoder("Llama"), tmp_path)


def test_a_base_in_the_same_folder_is_left_alone_and_so_is_a_card_of_the_user(tmp_path):
    decoder("Llama").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    attach_side_network(AutoModelForCausalLM.from_pretrained(tmp_path), CONFIG).save_pretrained(
        tmp_path
    )

    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    load_side_network(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)


def test_the_card_says_how_to_load_it(tmp_path):
    model = attach_side_network(decoder("Llama"), CONFIG)
    model.config._name_or_path = "someone/a-base"

    save_side_network(model, tmp_path)

    card = (tmp_path / "README.md").read_text()
    assert "base_model: someone/a-base" in card
    assert "base_model_relation: adapter" in card
    assert 'load_side_network(model, "FOLDER")' in card


@pytest.mark.parametrize("base", ["float", "int8"])
def test_updates_are_rounded_with_the_seed_of_the_side_network(base, base_folder, tmp_path):
    """It was that of the base, or 0 next to a float base, and so not the one of the products."""
    model = attach_side_network(base_of(base, base_folder), CONFIG)
    quantize_model_(side_network_of(model), QFTConfig(seed=5))
    args = arguments(tmp_path, QFTTrainingArguments)

    trainer = QFTTrainer(model=model, args=args, train_dataset=rows())

    assert trainer.create_optimizer().defaults["seed"] == 5


def test_any_optimizer_trains_a_side_network_that_model_init_attaches(tmp_path):
    """It was refused because there is no model yet when the Trainer is made."""
    args = arguments(tmp_path, max_steps=2)
    trainer = QFTTrainer(
        model_init=lambda: attach_side_network(decoder("Llama"), CONFIG),
        args=args,
        train_dataset=rows(),
    )
    trainer.train()
    assert bool(side_network_of(trainer.model).upsample.any())
    with pytest.raises(ValueError, match=r"got optim='adamw_torch.*side network may have any opt"):
        QFTTrainer(model_init=lambda: decoder("Llama"), args=args, train_dataset=rows())


def test_release_is_refused_with_what_to_leave_out(tmp_path):
    model = attach_side_network(decoder("Llama"), CONFIG)
    args = arguments(tmp_path, QFTTrainingArguments, gradient="release", max_grad_norm=0)

    with pytest.raises(ValueError, match=r"only its side network is trained.*Leave gradient out"):
        QFTTrainer(model=model, args=args, train_dataset=rows())

    assert quantization_config_of(side_network_of(model)) is None


def qlora(model):
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(target_modules=projections, r=8))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("downsample", ["adapter", "linear", "mean", "max"])
def test_less_is_kept_for_backward_than_by_qlora_and_by_full_training(
    downsample, checkpointing, base_folder
):
    """Compare the bytes that autograd keeps of one batch; QLoRA and the side network are on NF4."""
    inputs = {"input_ids": texts(4, 32), "labels": texts(4, 32)}
    models = {
        "full": base_of("float", base_folder),
        "qlora": qlora(base_of("nf4", base_folder)),
        "side": attach_side_network(
            base_of("nf4", base_folder), QSTConfig(r=16, rank=4, downsample=downsample)
        ),
    }
    kept = {}
    for name, model in models.items():
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if name == "qlora":
                model.enable_input_require_grads()
        kept[name], _ = bytes_saved(model.train(), **inputs)

    factor = 1.5 if checkpointing else 3  # all three include what the loss keeps of the logits
    assert kept["side"] * factor < min(kept["qlora"], kept["full"])


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_trl_trains_it_on_packed_texts(base, tmp_path):
    tokenizer = tiny_tokenizer()
    model = wide_decoder()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    model = attach_side_network(base_of(base, tmp_path / "base"), CONFIG)
    before = frozen_bits(model)
    args = SFTConfig(
        tmp_path / "run", max_steps=4, learning_rate=0.02, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, save_steps=4, max_length=32, packing=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer,
    )  # fmt: skip

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, value in before.items():
        assert_same_bits(trainer.model.state_dict()[name], value)
    again = load_side_network(
        base_of(base, tmp_path / "base"), Path(tmp_path / "run" / "checkpoint-4")
    )
    assert_same_bits(logits(again, input_ids=texts() % 40), logits(model, input_ids=texts() % 40))


@pytest.mark.parametrize("converted", ["the model", "back to float"])
def test_a_side_network_that_was_converted_is_saved_in_its_own_format(
    converted, base_folder, tmp_path
):
    """The folder once said the other format than that of its tensors, and nothing could load it."""
    model = attach_side_network(base_of("float", base_folder), CONFIG)
    if converted == "the model":
        quantize_model_(model, QFTConfig(group_size=5))
    else:
        quantize_model_(side_network_of(model), QFTConfig(group_size=5))
        dequantize_model_(side_network_of(model), torch.float32)
    disturbed_(model)
    save_side_network(model, tmp_path)

    base = base_of("float", base_folder)
    if converted == "the model":
        quantize_model_(base, QFTConfig(group_size=5))
    again = load_side_network(base, tmp_path)

    ids = torch.tensor([[5, 9, 33, 70]])
    assert_same_bits(logits(again, input_ids=ids), logits(model, input_ids=ids))
