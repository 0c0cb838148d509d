"""The stock Trainer and QFTTrainer on tiny real models: typical uses, and errors."""

import copy
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from qft_hf import (
    QFTConfig,
    QFTLion,
    QFTTrainer,
    QFTTrainingArguments,
    QFTWeight,
    dequantize_model_,
    memory_ledger,
    quantize_model_,
)
from qft_hf.quant import Int8Gradient
from tests.fresh import try_fresh
from tests.full_disk import files_of_at_most
from tests.hf.checkpoints import assert_same_state
from tests.hf.test_convert import interrupted_conversion
from tests.models import VOCAB_SIZE, tiny_bert, tiny_llama

LENGTH = 13


def sequences(n: int = 32, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token sequences with structure to learn: each counts on from a random start."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCAB_SIZE, (n, 1), generator=generator)
    ids = (starts + torch.arange(LENGTH)) % VOCAB_SIZE
    return [
        {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}
        for row in ids
    ]


def arguments(folder: Path, cls: type = TrainingArguments, **overrides) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "optim": "qft_lion",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return cls(**values | overrides)


def trainer_on(model, folder: Path, cls: type = Trainer, callbacks=None, **overrides) -> Trainer:
    return cls(
        model=model,
        args=arguments(folder, **overrides),
        train_dataset=sequences(),
        eval_dataset=sequences(8, seed=1),
        callbacks=callbacks,
    )


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Gradients(TrainerCallback):
    """Keeps copies of all gradients just before each step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.seen.append([p.grad.clone() for p in model.parameters()])


def dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.dequantize() if isinstance(gradient, Int8Gradient) else gradient


# --- the name alone is enough ---------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_float_model_is_converted_and_learns(cls, tmp_path, caplog):
    model = tiny_llama(tied=True)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_on(model, tmp_path, cls, max_steps=40, learning_rate=3e-3)
        trainer.train()

    assert "quantized the float LlamaForCausalLM to INT8" in caplog.text
    assert all(isinstance(p, QFTWeight) for p in model.parameters() if p.ndim == 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    losses = history(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]


def test_every_parameter_moves(tmp_path):
    model = tiny_llama()
    trainer = trainer_on(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    trainer.train()

    after = model.state_dict()
    for name in (
        n for n in after if n.endswith(("weight_q", "weight_outlier_value", "norm.weight"))
    ):
        assert not torch.equal(before[name], after[name]), name


def test_both_trainers_give_the_same_bits(tmp_path):
    states = []
    for cls in (Trainer, QFTTrainer):
        model = tiny_llama()
        trainer_on(model, tmp_path, cls).train()
        states.append(model.state_dict())
    assert_same_state(*states)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_trainer_finishes_the_conversion_that_an_earlier_one_has_begun(cls, tmp_path):
    """As when a cell of a notebook is interrupted and run again."""
    model = interrupted_conversion(0.85, QFTConfig())
    n_int8 = sum(isinstance(parameter, QFTWeight) for parameter in model.parameters())
    trainer = trainer_on(model, tmp_path / "again", cls)
    trainer.train()

    straight = trainer_on(tiny_llama(), tmp_path / "straight", cls)
    straight.train()
    assert 0 < n_int8 < sum(isinstance(p, QFTWeight) for p in straight.model.parameters())
    assert_same_state(straight.model.state_dict(), model.state_dict())


def test_no_model_stays_float_when_it_is_made_by_model_init(tmp_path):
    trainer = QFTTrainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=sequences(),
    )
    trainer.train()
    assert isinstance(trainer.model.lm_head.weight, QFTWeight)
    assert isinstance(trainer.optimizer.optimizer, QFTLion)


def test_arguments_unpickle_in_a_process_that_never_heard_of_us(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    script = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False); "
        "print(args.optim.value, 'qft_hf' in sys.modules)"
    )
    output = try_fresh(script, tmp_path / "training_args.bin")
    assert output.stdout.split() == ["qft_lion", "True"]


def test_the_format_of_the_arguments_reaches_the_model(tmp_path):
    args = arguments(
        tmp_path, QFTTrainingArguments, group_size=11, outlier_fraction=0.1,
        modules_to_not_convert=["lm_head"], quantization_seed=5, nonfinite="skip",
    )  # fmt: skip
    trainer = QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())

    weight = trainer.model.model.layers[0].mlp.down_proj.weight
    assert weight.group_size == 11
    assert weight.outlier_values.shape[1] == 8  # ceil(0.1 * 75)
    assert not isinstance(trainer.model.lm_head.weight, QFTWeight)
    optimizer = trainer.create_optimizer()
    assert (optimizer.defaults["seed"], optimizer.nonfinite) == (5, "skip")


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_clipping_and_logged_norm_are_those_of_the_dequantized_gradients(max_grad_norm, tmp_path):
    unclipped = tiny_llama()
    clipped = tiny_llama()
    seen = [Gradients(), Gradients()]
    trainers = [
        trainer_on(model, tmp_path, max_steps=1, callbacks=[gradients], max_grad_norm=norm)
        for model, gradients, norm in zip(
            (unclipped, clipped), seen, (1e9, max_grad_norm), strict=True
        )
    ]
    for trainer in trainers:
        trainer.train()

    raw = [dense(g).double() for g in seen[0].seen[0]]
    norm = torch.stack([g.square().sum() for g in raw]).sum().sqrt().item()
    assert history(trainers[0], "grad_norm")[0] == pytest.approx(norm, rel=1e-6)
    assert history(trainers[1], "grad_norm")[0] == pytest.approx(norm, rel=1e-6)

    factor = min(1.0, max_grad_norm / (norm + 1e-6))
    for before, after in zip(seen[0].seen[0], seen[1].seen[0], strict=True):
        torch.testing.assert_close(dense(after), dense(before) * factor, rtol=1e-5, atol=0)
        if isinstance(before, Int8Gradient):
            assert torch.equal(before.codes, after.codes)


class OfRows(Trainer):
    """The loss reads rows of the table's weight directly, not through the module."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        rows = model.get_input_embeddings().weight[inputs["input_ids"]]
        return (rows - 1).square().mean()


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_of_embeddings_alone_has_its_gradient_and_falls(tied, gradient, tmp_path):
    """The logged norm was once 0, and no weight moved."""
    model = quantize_model_(tiny_llama(tied=tied), QFTConfig())
    twin = dequantize_model_(copy.deepcopy(model), torch.float32)
    trainer = trainer_on(
        model, tmp_path, OfRows, optim_args=f"gradient={gradient}", max_grad_norm=0, max_steps=4,
        per_device_train_batch_size=32, weight_decay=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    ids = torch.stack([sequence["input_ids"] for sequence in trainer.train_dataset])
    trainer.compute_loss(twin, {"input_ids": ids}).backward()
    exact = twin.get_input_embeddings().weight.grad

    trainer.train()

    norms, losses = history(trainer, "grad_norm"), history(trainer, "loss")
    # A nonzero element is off by at most half a quantum, which the largest of its row determines.
    sizes = exact.abs()[exact.any(dim=1)]
    error = (sizes.amax(dim=1, keepdim=True) / 254 / sizes).max().item()
    assert error < 0.01
    assert norms[0] == pytest.approx(exact.norm().item(), rel=error + 1e-5)
    # Lion moves each element toward 1 by the rate, starting near 0.
    assert losses[0] - losses[-1] == pytest.approx(2 * 3 * 1e-3, rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_accumulation_splits_agree_to_int8_rounding(tied, tmp_path):
    sums = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        gradients = Gradients()
        trainer_on(
            tiny_llama(tied=tied), tmp_path, max_steps=1, callbacks=[gradients],
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
        ).train()  # fmt: skip
        sums.append([dense(g) for g in gradients.seen[0]])
    for other in sums[1:]:
        for whole, split in zip(sums[0], other, strict=True):
            noise = (whole - split).norm() / whole.norm()
            assert -20 * noise.log10() >= 30, "SNR in dB"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant, tmp_path):
    states = []
    for overrides in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        },
    ):
        model = tiny_llama(tied=True)
        trainer_on(model, tmp_path, **overrides).train()
        states.append(model.state_dict())
    assert_same_state(*states)


@pytest.mark.parametrize(
    ("dtype", "overrides"),
    [(torch.float32, {"bf16": True}), (torch.bfloat16, {}), (torch.bfloat16, {"bf16": True})],
    ids=["autocast", "bf16 model", "both"],
)
def test_bf16_trains(dtype, overrides, tmp_path):
    model = tiny_llama(dtype=dtype)
    trainer = trainer_on(model, tmp_path, max_steps=40, learning_rate=3e-3, **overrides)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert model.lm_head.weight.dtype == dtype


# --- the Trainer's life ---------------------------------------------------------------------


def test_evaluate_generate_best_model_and_early_stopping(tmp_path):
    model = tiny_llama(tied=True)
    trainer = trainer_on(
        model, tmp_path, QFTTrainer, max_steps=12, learning_rate=0.02,  # too high: loss rises
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()

    losses = history(trainer, "eval_loss")
    assert len(losses) < 12
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    ids = model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 7)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_resume_equals_the_straight_run_bit_for_bit(accumulation, sharded, cls, tmp_path):
    def make():
        model = tiny_llama(tied=True)
        if sharded:
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="9KB")
        return trainer_on(
            model, tmp_path, cls, save_strategy="steps", save_steps=3,
            gradient_accumulation_steps=accumulation, lr_scheduler_type="cosine",
        )  # fmt: skip

    straight = make()
    straight.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "model.safetensors").exists() != sharded
    resumed = make()
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())
    for key in ("loss", "grad_norm", "learning_rate"):
        assert history(straight, key) == history(resumed, key)
    states = [t.optimizer.state_dict()["state"] for t in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name]))


def test_checkpoint_reloads_as_int8_with_from_pretrained(tmp_path):
    trainer = trainer_on(tiny_llama(tied=True), tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    assert_same_state(trainer.model.state_dict(), loaded.state_dict())


def test_resume_with_another_format_raises(tmp_path):
    first = quantize_model_(tiny_llama(), QFTConfig(outlier_fraction=0.0))
    trainer_on(first, tmp_path, save_strategy="steps", save_steps=3).train()

    second = trainer_on(tiny_llama(), tmp_path)
    with pytest.raises(RuntimeError, match=r"mixture of two models\. Load a complete checkpoint"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_resume_from_another_model_raises(tmp_path):
    trainer_on(tiny_llama(), tmp_path, save_strategy="steps", save_steps=3).train()
    other = trainer_on(tiny_llama(hidden_size=52), tmp_path)
    with pytest.raises(RuntimeError, match="written for another model or with another QFTConfig"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class FullDisk(TrainerCallback):
    """Fills the disk after step 4."""

    def __init__(self, held):
        self.held = held

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.held.enter_context(files_of_at_most(30_000))


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    with ExitStack() as held:
        trainer = trainer_on(
            tiny_llama(), tmp_path, QFTTrainer, callbacks=[FullDisk(held)],
            save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=8,
        )  # fmt: skip
        with pytest.raises(Exception, match="File too large") as error:
            trainer.train()

    (note,) = error.value.__notes__  # one, although the model is a draft in a draft
    assert note.startswith(f"Writing to {tmp_path} did not finish")
    assert "incomplete files were removed; everything there is as it was" in note
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    trainer = trainer_on(tiny_llama(), tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_second_architecture_with_biases_trains(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB_SIZE, (48, LENGTH), generator=generator)
    examples = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in ids
    ]
    model = tiny_bert()
    args = arguments(tmp_path, max_steps=40, learning_rate=3e-3)
    trainer = QFTTrainer(model=model, args=args, train_dataset=examples)
    trainer.train()
    losses = history(trainer, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- ledger, logs, card ---------------------------------------------------------------------


def test_the_ledger_accounts_for_every_stored_byte(tmp_path, capsys):
    model = tiny_llama(tied=True)
    trainer = trainer_on(model, tmp_path, QFTTrainer)
    trainer.train()

    tensors = [
        part
        for p in model.parameters()
        for part in (p.fields().values() if isinstance(p, QFTWeight) else (p,))
    ]
    state = [
        value
        for entry in trainer.optimizer.state.values()
        for name, value in entry.items()
        if name != "step"  # a number on the host
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*tensors, *state, *model.buffers())}  # fmt: skip
    # After the step no gradient is left; the ledger printed during training includes gradients.
    ledger = memory_ledger(model, trainer.optimizer)
    assert ledger.total_bytes == sum(storages.values())
    live = {row.state: row.bytes for row in trainer.ledger.rows}
    assert trainer.ledger.total_bytes - live["gradients"] == ledger.total_bytes
    assert str(trainer.ledger) in capsys.readouterr().out


def test_skipped_steps_are_logged(tmp_path):
    trainer = trainer_on(tiny_llama(), tmp_path, QFTTrainer)
    trainer.train()
    assert history(trainer, "qft/skipped_steps") == [0.0] * 6


def test_the_card_says_what_was_done_and_how_to_load_it(tmp_path):
    trainer = trainer_on(tiny_llama(), tmp_path, QFTTrainer, eval_strategy="steps", eval_steps=3)
    trainer.train()
    trainer.create_model_card(finetuned_from="someone/tiny-llama", tags=["mine"])
    trainer.create_model_card(finetuned_from="someone/tiny-llama")

    card = (tmp_path / "README.md").read_text()
    head, _, text = card.partition("\n---\n")
    for entry in ("- qft", "- int8", "base_model: someone/tiny-llama"):
        assert entry in head
    for row in trainer.ledger.rows:
        assert f"| {row.state} | {row.bytes / 1e6:,.1f} |" in text
    assert "1 % of each row" in text
    assert "| products | with dequantized weights |" in text
    first, last = history(trainer, "eval_loss")
    assert f"| 3 | {first:.4f} |" in text
    assert f"| 6 | {last:.4f} |" in text
    assert "import qft_hf" in text
    assert text.count("## How to load it") == 1


# --- what cannot work -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fp16": True, "use_cpu": True}, "Use bf16=True"),
        ({"torch_compile": True, "use_cache": True}, "Set use_cache=False.*leave the compiler off"),
    ],
)
def test_unsupported_arguments_say_what_to_do(overrides, message, cls, tmp_path):
    args = arguments(tmp_path)
    for name, value in overrides.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        cls(model=tiny_llama(), args=args)


def test_float16_of_the_launcher_is_refused_too(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision fp16` sets this variable."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"accelerate launch.*Use bf16=True"):
        QFTTrainer(model=tiny_llama(), args=arguments(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed", "zero.json", "Remove deepspeed"),
        ("fsdp", "full_shard", "Remove fsdp. On several GPUs start a process for each"),
    ],
)
def test_sharding_of_float_weights_is_refused_before_anything_happens(
    name, value, message, tmp_path
):
    args = arguments(tmp_path)
    setattr(args, name, value)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        QFTTrainer(model=model, args=args)
    assert not isinstance(model.lm_head.weight, QFTWeight)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_tp_size", 2, "Load the model without tp_plan"),
        ("peft_config", {}, "load the model without adapters"),
    ],
)
def test_models_that_hold_other_things_than_plain_weights_are_refused(
    attribute, value, message, tmp_path
):
    model = tiny_llama()
    setattr(model, attribute, value)
    with pytest.raises(ValueError, match=message):
        QFTTrainer(model=model, args=arguments(tmp_path))


def test_a_float16_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Load the model with dtype=torch\.bfloat16"):
        trainer_on(tiny_llama(dtype=torch.float16), tmp_path)


def test_data_parallel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Set CUDA_VISIBLE_DEVICES to one GPU"):
        trainer_on(torch.nn.DataParallel(tiny_llama()), tmp_path, QFTTrainer)


def test_a_foreign_optimizer_by_name_is_refused_when_training_begins(tmp_path):
    model = quantize_model_(tiny_llama(), QFTConfig())
    trainer = trainer_on(model, tmp_path, optim="adamw_torch")
    assert trainer.evaluate()["eval_loss"] > 0  # evaluating needs no optimizer
    with pytest.raises(TypeError, match="Set optim='qft_lion'"):
        trainer.train()


def test_a_foreign_optimizer_beside_the_name_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="Pass no optimizer, or a QFTLion"):
        Trainer(
            model=model,
            args=arguments(tmp_path),
            optimizers=(torch.optim.AdamW(model.parameters()), None),
        )
    assert not isinstance(model.lm_head.weight, QFTWeight)


def test_qft_trainer_refuses_another_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"Set optim='qft_lion' or .* or use"):
        trainer_on(tiny_llama(), tmp_path, QFTTrainer, optim="adamw_torch")


def test_arguments_are_taken_in_the_order_of_the_stock_trainer(tmp_path):
    """From the third on they were once refused."""
    args = QFTTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    rows = sequences(4)
    for cls in (Trainer, QFTTrainer):
        trainer = cls(tiny_llama(), args, default_data_collator, rows)
        assert trainer.data_collator is default_data_collator
        assert trainer.train_dataset is rows
    with pytest.raises(TypeError, match="got train_dataset by position and by name"):
        QFTTrainer(tiny_llama(), args, default_data_collator, rows, train_dataset=rows)
    with pytest.raises(TypeError, match="takes a model and TrainingArguments by position"):
        QFTTrainer(tiny_llama(), rows)
