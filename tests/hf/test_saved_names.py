"""Runs of models whose checkpoints have other names of tensors than the model in memory."""

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from qft_hf import QFTConfig, QFTTrainer, quantize_model_
from qft_hf.hf.checkpoint import check_weights
from qft_hf.hf.saved_names import names_by_saved_name
from qft_hf.hf.tensor_files import tensor_names
from tests.hf.checkpoints import assert_same_state
from tests.scripts.commands import load

TINY = load("families").TINY
RENAMED = ("Mixtral", "GPT-NeoX", "ViT", "SegFormer", "LLaVA", "Qwen2.5-VL")


class Nothing(Dataset):
    """Rows without content: the collator returns the batch of the family."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, int]:
        return {}


def trainer_of(name, cls, folder, **overrides):
    batch = TINY[name].batch()
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "optim": "qft_lion", "learning_rate": 1e-3, "max_steps": 4,
            "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
            "remove_unused_columns": False, "per_device_train_batch_size": 2,
        } | overrides
    )  # fmt: skip
    return cls(
        model=TINY[name].model(), args=arguments, train_dataset=Nothing(),
        eval_dataset=Nothing(), data_collator=lambda rows: dict(batch),
    )  # fmt: skip


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
@pytest.mark.parametrize("name", RENAMED)
def test_a_resumed_run_ends_as_the_straight_one(name, cls, tmp_path):
    """QFTTrainer refused the checkpoint as that of another model.

    The Trainer ignored the tensors and trained on from the weights that the model was built with.
    Only models without renamed tensors were resumed in tests.
    """
    straight = trainer_of(name, cls, tmp_path)
    straight.train()
    assert names_by_saved_name(straight.model)

    resumed = trainer_of(name, cls, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(resumed.model, straight.model)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_the_best_model_is_loaded_from_shards(cls, tmp_path):
    trainer = trainer_of(
        "Mixtral", cls, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        learning_rate=0.1, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda *a, **kw: save(*a, max_shard_size="9KB", **kw)
    first = {}
    evaluate = trainer.evaluate

    def evaluating(*args, **kwargs):
        scores = evaluate(*args, **kwargs)
        if trainer.state.global_step == 2:
            first.update({name: t.clone() for name, t in trainer.model.state_dict().items()})
            scores["eval_loss"] = 1e9  # the best by far
        return scores

    trainer.evaluate = evaluating
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / "model.safetensors.index.json").exists()
    assert all(torch.equal(t, first[name]) for name, t in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", TINY)
def test_all_saved_names_of_a_family_are_known(name, tmp_path):
    model = quantize_model_(TINY[name].model(), QFTConfig())
    model.save_pretrained(tmp_path)
    check_weights(model, tmp_path)

    loaded = type(model).from_pretrained(tmp_path)
    check_weights(loaded, tmp_path)
    translated = names_by_saved_name(loaded)
    names = set(tensor_names(tmp_path.glob("*.safetensors")))
    assert {translated.get(name, name) for name in names} <= set(loaded.state_dict())


def test_accelerate_finds_the_tensors(tmp_path):
    """It left the model with its initial values, and warned of unexpected keys."""
    model = quantize_model_(TINY["Mixtral"].model(), QFTConfig())
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = TINY["Mixtral"].auto.from_config(TINY["Mixtral"].config())
    accelerate.load_checkpoint_in_model(quantize_model_(other, QFTConfig()), tmp_path)
    assert_same_state(other, model)


def test_a_float_model_and_a_module_of_ones_own_have_no_other_names():
    assert names_by_saved_name(TINY["Mixtral"].model()) == {}
    assert names_by_saved_name(torch.nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("name", ["GPT-NeoX", "Gemma 3, with images", "PaliGemma", "Llama"])
def test_a_new_float_head_and_the_int8_embedding_that_it_was_tied_to_stay_apart(name, tmp_path):
    """Ties were looked up by the model's names: renamed weights were tied and then refused."""
    model = tied(name)
    quantize_model_(model, QFTConfig())
    rows, columns = model.get_output_embeddings().weight.shape
    model.set_output_embeddings(nn.Linear(columns, rows, bias=False))
    model.save_pretrained(tmp_path)

    assert_same_state(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["Gemma 3, with images", "PaliGemma", "InternVL", "Llama"])
def test_a_bare_model_keeps_the_embedding_float_that_an_absent_head_does(name, tmp_path):
    """The embedding was looked up by the model's name, and refused as a float tensor."""
    model = tied(name)
    quantize_model_(model, QFTConfig(modules_to_not_convert=["lm_head"]))
    model.save_pretrained(tmp_path)

    base = type(model.base_model).from_pretrained(tmp_path)

    assert_same_state(base, model.base_model)
    assert type(base.get_input_embeddings().weight) is nn.Parameter


def tied(name):
    """Return the tiny model of a family with tied embeddings."""
    config = TINY[name].config()
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    model = TINY[name].auto.from_config(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model
