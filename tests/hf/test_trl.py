"""TRL's own trainers with models that are INT8 from the embedding to the head."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from qft_hf.hf.arguments import QFTTrainingArguments
from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import dequantize_model_, quantize_model_
from qft_hf.hf.trainer import QFTTrainer
from qft_hf.quant import QFTWeight
from tests.finetune.chats import tiny_tokenizer
from tests.hf.checkpoints import assert_same_state
from tests.models import tiny_llama

LR, STEPS = 1e-3, 5
TEXTS = ["The quick brown fox", "How are you doing today?", "the answer to the question"] * 4
PAIRS = {"prompt": TEXTS, "chosen": [" I am fine."] * 12, "rejected": [" lazy dog"] * 12}
LABELS = {"completion": [" I am fine.", " lazy dog"] * 6, "label": [True, False] * 6}
TEACHER = tiny_llama(vocab_size=len(tiny_tokenizer()), max_position_embeddings=128, seed=1)
SAMPLING = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}


def variety(completions, **kwargs):
    """A reward that differs between completions."""
    return [float(len(set(completion))) for completion in completions]


# Trainer, class of its arguments, arguments, data, and further arguments of the Trainer.
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {"max_length": 32}, {"text": TEXTS}, {}),
    "dpo": (DPOTrainer, DPOConfig, {}, PAIRS, {}),
    "kto": (KTOTrainer, KTOConfig, {}, {"prompt": TEXTS, **LABELS}, {}),
    "reward": (RewardTrainer, RewardConfig, {}, PAIRS, {}),
    "grpo": (GRPOTrainer, GRPOConfig, SAMPLING, {"prompt": TEXTS}, {"reward_funcs": variety}),
    "rloo": (RLOOTrainer, RLOOConfig, SAMPLING, {"prompt": TEXTS}, {"reward_funcs": variety}),
    "distillation": (
        DistillationTrainer,
        DistillationConfig,
        {"max_completion_length": 6},
        {"prompt": TEXTS},
        {"teacher_model": TEACHER},
    ),
}
# Trainers whose samples depend on the last digit of a logit.
SAMPLERS = ("grpo", "rloo", "distillation")


class FloatLion(torch.optim.Optimizer):
    """Lion with everything in FP32."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": LR})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            momentum = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
            direction = torch.lerp(parameter.grad, momentum, 0.9).sign()
            parameter.sub_(direction, alpha=self.param_groups[0]["lr"])
            momentum.lerp_(parameter.grad, 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(kind, folder):
    if kind == "reward":
        torch.manual_seed(0)
        auto, arguments = AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        auto, arguments = AutoModelForCausalLM, {}
    return auto.from_pretrained(folder, dtype=torch.float32, **arguments)


def trainer_of(kind, model, output_dir, cls=None, **changes):
    trl_class, config, options, data, beside = TRAINERS[kind]
    args = config(
        **{
            "output_dir": output_dir,
            "optim": "qft_lion",
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            **options,
            **changes.pop("args", {}),
        }
    )
    return (cls or trl_class)(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny_tokenizer(),
        **{**beside, **changes},
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def head_of(model):
    return model.score if hasattr(model, "score") else model.lm_head


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_fully_int8_model_trains_as_its_float_twin(kind, folder, tmp_path):
    """All weights, including the head, and the reference model are INT8 in TRL's own trainer."""
    model = load(kind, folder)
    twin = dequantize_model_(quantize_model_(load(kind, folder), QFTConfig()), torch.float32)
    trainer = trainer_of(kind, model, tmp_path)
    head = head_of(model).weight
    assert isinstance(head, QFTWeight)
    assert {type(p) for p in model.parameters() if p.ndim > 1} == {QFTWeight}
    if getattr(trainer, "ref_model", None) is not None:
        assert_same_state(trainer.ref_model, model)
    before = head.codes.clone()

    int8 = losses(trainer)

    assert (head.codes != before).float().mean() > 0.5
    if kind in SAMPLERS:  # compared in the next test
        assert all(torch.tensor(int8).isfinite())
        return
    optimizer = FloatLion(twin.parameters())
    beside = {"optimizers": (optimizer, None), "args": {"optim": "adamw_torch"}}
    if kind in ("dpo", "kto"):
        beside["ref_model"] = dequantize_model_(
            quantize_model_(load(kind, folder), QFTConfig()), torch.float32
        )
    of_twin = losses(trainer_of(kind, twin, tmp_path, **beside))
    # At first the weights are the same, and the arithmetic differs only in order.
    assert int8[0] == pytest.approx(of_twin[0], rel=1e-4)
    # Later, INT8 rounds gradients and updates; the decrease of the loss agrees to a tenth.
    assert (int8[0] - int8[-1]) == pytest.approx(of_twin[0] - of_twin[-1], rel=0.1)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_is_learned_from_the_same_completions_is_what_float_learns(kind, folder, tmp_path):
    """The INT8 policy samples and scores once; its float twin trains on the same completions."""
    scored = []

    class Recording(TRAINERS[kind][0]):
        def _generate_and_score_completions(self, inputs):
            scored.append(super()._generate_and_score_completions(inputs))
            return scored[-1]

    class Replaying(TRAINERS[kind][0]):
        def _generate_and_score_completions(self, inputs):
            return next(recorded)

    model = load(kind, folder)
    twin = dequantize_model_(quantize_model_(load(kind, folder), QFTConfig()), torch.float32)
    trainer = trainer_of(kind, model, tmp_path, Recording)
    assert {type(p) for p in model.parameters() if p.ndim > 1} == {QFTWeight}
    int8 = losses(trainer)
    recorded = iter(scored)
    beside = {"optimizers": (FloatLion(twin.parameters()), None), "args": {"optim": "adamw_torch"}}
    replayed = trainer_of(kind, twin, tmp_path, Replaying, **beside)

    of_twin = losses(replayed)

    assert next(recorded, None) is None  # all completions were used
    start = dequantize_model_(quantize_model_(load(kind, folder), QFTConfig()), torch.float32)
    moved = divergence(start, twin)
    assert moved > 1e-3
    assert divergence(start, model) == pytest.approx(moved, rel=0.1)
    # RLOO's loss compares the policy with the one that sampled, which is INT8 for both.
    assert kind == "rloo" or int8 == pytest.approx(of_twin, rel=1e-2, abs=1e-2 * moved)


@torch.no_grad()
def divergence(start, model):
    """Return the KL divergence from a policy's start to the policy on a text, in nats per token."""
    ids = torch.tensor(tiny_tokenizer()(TEXTS[:1])["input_ids"])
    of_start, of_model = (of.eval()(ids).logits.log_softmax(-1) for of in (start, model))
    return float((of_start.exp() * (of_start - of_model)).sum(-1).mean())


def test_the_policy_of_dpo_starts_at_its_reference(folder, tmp_path):
    """With a float reference the first loss was 0.6935, due to the rounding of the weights."""
    first = losses(trainer_of("dpo", load("dpo", folder), tmp_path, args={"max_steps": 1}))[0]

    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_qft_trainer_mixed_into_trls(kind, folder, tmp_path):
    class Mixed(QFTTrainer, TRAINERS[kind][0]):
        pass

    model = load(kind, folder)
    trainer = trainer_of(
        kind, model, tmp_path, Mixed, args={"save_strategy": "steps", "save_steps": STEPS}
    )

    mixed = losses(trainer)

    if kind not in SAMPLERS:
        assert mixed == losses(trainer_of(kind, load(kind, folder), tmp_path / "stock"))
    assert trainer.ledger.n_quantized > 0.9 * trainer.ledger.n_parameters
    again = type(model).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert_same_state(again, model)


def test_a_model_by_its_name_is_int8_too(folder, tmp_path):
    class Mixed(QFTTrainer, SFTTrainer):
        pass

    for cls in (SFTTrainer, Mixed):
        args = {"model_init_kwargs": {"dtype": "float32"}}
        trainer = trainer_of("sft", str(folder), tmp_path, cls, args=args)
        assert {type(p) for p in trainer.model.parameters() if p.ndim > 1} == {QFTWeight}


def test_an_int8_checkpoint_has_an_int8_reference(folder, tmp_path):
    model = quantize_model_(load("dpo", folder), QFTConfig(group_size=16))
    model.save_pretrained(tmp_path / "int8")

    trainer = trainer_of("dpo", load("dpo", tmp_path / "int8"), tmp_path)

    assert_same_state(trainer.ref_model, model)


def test_a_float_policy_keeps_its_float_reference(folder, tmp_path):
    args = {"optim": "adamw_torch"}
    trainer = trainer_of("dpo", load("dpo", folder), tmp_path, args=args)

    assert {type(p) for p in trainer.ref_model.parameters()} == {nn.Parameter}


def test_a_reference_that_is_mixed_with_the_policy_is_refused_at_the_start(folder, tmp_path):
    with pytest.raises(ValueError, match=r"sync_ref_model=True .*Leave sync_ref_model off"):
        trainer_of("dpo", load("dpo", folder), tmp_path, args={"sync_ref_model": True})


def test_release_gives_the_bits_of_stack(folder, tmp_path):
    models = []
    for mode in ("stack", "release"):
        models.append(load("sft", folder))
        args = {"optim_args": f"gradient={mode}"}
        trainer_of("sft", models[-1], tmp_path / mode, args=args).train()

    assert_same_state(*models)


SEVERAL = {"steps_per_generation": 2}  # one generation, whose completions are several batches


@pytest.mark.parametrize(
    ("kind", "options"), [("sft", {}), ("grpo", SEVERAL), ("rloo", SEVERAL), ("distillation", {})]
)
def test_exact_clipping_samples_and_counts_as_the_stack_does(kind, options, folder, tmp_path):
    """Its first pass once sampled, and counted steps and tokens: other completions were trained."""

    class Mixed(QFTTrainer, TRAINERS[kind][0]):
        pass

    runs = []
    for modes in ("gradient=stack", "gradient=release,clipping=exact"):
        args = {**options, "max_grad_norm": 0.01, "optim_args": modes}
        trainer = trainer_of(kind, load(kind, folder), tmp_path, Mixed, args=args)
        trainer.train()
        runs.append(trainer)

    stack, exact = (run.state.log_history for run in runs)
    assert len(stack) == STEPS + 1
    for waited, released in zip(stack, exact, strict=True):
        for name in waited.keys() & {"loss", "num_tokens", "reward", "completions/mean_length"}:
            assert released[name] == pytest.approx(waited[name], rel=1e-4, abs=1e-6), name
    if options:
        assert {run._step for run in runs} == {STEPS}
    assert min(entry["grad_norm"] for entry in stack[:-1]) > 0.01  # all steps are clipped


def test_a_class_with_trls_trainer_says_what_its_arguments_are(folder, tmp_path):
    """It was a TypeError about a keyword that the user had not written."""

    class Mixed(QFTTrainer, DPOTrainer):
        pass

    for args, got in ((None, "none"), (QFTTrainingArguments(tmp_path), "QFTTrainingArguments")):
        with pytest.raises(TypeError, match=rf"needs args=DPOConfig\(.*got {got}.*into optim_args"):
            Mixed(model=load("dpo", folder), args=args)
    config = DPOConfig(tmp_path, optim="qft_lion", use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="other arguments of DPOTrainer by name"):
        Mixed(load("dpo", folder), load("dpo", folder), config)  # the order of DPOTrainer
    with pytest.raises(TypeError, match="other arguments of DPOTrainer by name"):
        Mixed(load("dpo", folder), config, Dataset.from_dict(PAIRS))
