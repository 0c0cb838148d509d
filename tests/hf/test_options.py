"""An option given by field, by flag or by `optim_args` takes effect or raises."""

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend
from transformers.training_args import OptimizerNames

from qft_hf import (
    QFTConfig,
    QFTLion,
    QFTTrainer,
    QFTTrainingArguments,
    chunk_loss_,  # noqa: F401  an error names it, and a test does what it says
    dequantize_model_,
    quantize_model_,
)
from qft_hf.hf.callback import SAVED
from qft_hf.hf.card_facts import hyperparameters_of
from qft_hf.hf.optimizers import FIELDS, OPTIMIZERS, OPTIONS
from tests.hf.test_trainer import arguments, assert_same_state, history, sequences, trainer_on
from tests.models import tiny_llama

# A non-default value of each option, and the other options that it requires.
VALUES = {
    "gradient": ("release", {}),
    "accumulation": ("forbid", {"gradient": "release"}),
    "clipping": ("previous", {"gradient": "release"}),
    "nonfinite": ("skip", {}),
    "stochastic_rounding": (False, {}),
    "seed": (7, {}),
    "beta1": (0.85, {}),
    "beta2": (0.97, {}),
    "eps": (1e-5, {}),
    "momentum_bits": (4, {}),
}
BAD_VALUES = {
    "gradient": ("stak", ValueError, "gradient must be 'stack' or 'release'"),
    "accumulation": ("kept", ValueError, "accumulation must be 'keep' or 'forbid'"),
    "clipping": ("norm", ValueError, "clipping must be None or 'exact'"),
    "nonfinite": ("ignore", ValueError, "nonfinite must be 'raise' or 'skip'"),
    "stochastic_rounding": (1, TypeError, "stochastic_rounding must be true or false, got 1"),
    "seed": (-1, ValueError, r"seed must be in \[0, 2\*\*63\)"),
    "beta1": (1.5, ValueError, r"betas must be two numbers in \[0, 1\)"),
    "beta2": (math.nan, ValueError, "beta2 must be a finite number, got nan"),
    "eps": ("small", TypeError, "eps must be a number"),
    "momentum_bits": (False, TypeError, "momentum_bits must be an integer, got False"),
}
TAKEN = [(name, option) for name, entry in OPTIMIZERS.items() for option in entry.options]
NOT_TAKEN = [
    (name, option)
    for name, entry in OPTIMIZERS.items()
    for option in OPTIONS
    if option not in entry.options
]


def by_field(folder: Path, options: dict, **overrides) -> QFTTrainingArguments:
    fields = {FIELDS[name]: value for name, value in options.items()}
    return arguments(folder, QFTTrainingArguments, **fields | overrides)


def by_text(folder: Path, options: dict, **overrides) -> TrainingArguments:
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return arguments(folder, **{"optim_args": text} | overrides)


def by_text_beside_fields(folder: Path, options: dict, **overrides) -> QFTTrainingArguments:
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return arguments(folder, QFTTrainingArguments, **{"optim_args": text} | overrides)


def norm_for(options: dict) -> float:
    return 1.0 if "clipping" in options or options.get("gradient") != "release" else 0.0


def in_use(optimizer, option: str):
    group = optimizer.param_groups[0]
    if option in ("beta1", "beta2"):
        return group["betas"][("beta1", "beta2").index(option)]
    return group[option] if option in group else getattr(optimizer, option)


# --- the table ------------------------------------------------------------------------------


def test_options_fields_and_these_tests_are_complete():
    fields = QFTTrainingArguments.__dataclass_fields__
    assert VALUES.keys() == BAD_VALUES.keys() == OPTIONS.keys() == FIELDS.keys()
    assert [name for name in FIELDS.values() if fields[name].default is not None] == []
    assert {option for _, option in TAKEN} <= OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_name_is_known_to_the_trainer_and_trains(name, tmp_path):
    assert pickle.loads(pickle.dumps(OptimizerNames(name))) is OptimizerNames(name)
    rate = 1e-1 if name == "qft_sgd" else 1e-3
    trainer = trainer_on(tiny_llama(), tmp_path, optim=name, max_steps=20, learning_rate=rate)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is OPTIMIZERS[name].optimizer_class
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


@pytest.mark.parametrize("make", [by_field, by_text])
@pytest.mark.parametrize(("name", "option"), TAKEN)
def test_each_option_reaches_the_optimizer(name, option, make, tmp_path):
    value, beside = VALUES[option]
    options = {**beside, option: value}
    args = make(tmp_path, options, optim=name, max_grad_norm=norm_for(options))
    optimizer = Trainer(model=tiny_llama(), args=args).create_optimizer()
    for one, wanted in options.items():
        assert in_use(optimizer, one) == wanted


@pytest.mark.parametrize("make", [by_field, by_text])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_given_is_the_optimizers_own(name, make, tmp_path):
    args = make(tmp_path, {}, optim=name)
    optimizer = Trainer(model=tiny_llama(), args=args).create_optimizer()
    own = OPTIMIZERS[name].optimizer_class([nn.Parameter(torch.zeros(1))])
    for option in OPTIMIZERS[name].options:
        assert in_use(optimizer, option) == in_use(own, option), option


def test_one_beta_leaves_the_other_at_lions(tmp_path):
    for given, betas in (({"beta1": 0.8}, (0.8, 0.99)), ({"beta2": 0.999}, (0.9, 0.999))):
        args = by_field(tmp_path, given)
        assert Trainer(model=tiny_llama(), args=args).create_optimizer().defaults["betas"] == betas


@pytest.mark.parametrize(("name", "option"), NOT_TAKEN)
def test_an_option_of_another_optimizer_is_refused(name, option, tmp_path):
    value, _ = VALUES[option]
    with pytest.raises(ValueError, match=rf"{name} has no {FIELDS[option]}, got .* Leave it out"):
        by_field(tmp_path, {option: value}, optim=name)
    with pytest.raises(ValueError, match=rf"optim_args has '{option}=.*{name} takes"):
        Trainer(model=tiny_llama(), args=by_text(tmp_path, {option: value}, optim=name))


@pytest.mark.parametrize(("name", "option"), TAKEN)
def test_a_bad_value_is_refused_at_once(name, option, tmp_path):
    value, error, message = BAD_VALUES[option]
    _, beside = VALUES[option]
    options = {**beside, option: value}
    with pytest.raises(error, match=message):
        by_field(tmp_path, options, optim=name, max_grad_norm=norm_for(options))


def test_flags_are_the_fields(tmp_path):
    flags = [
        "--gradient", "release", "--clipping", "tensor", "--momentum_bits", "4",
        "--beta2", "0.98", "--stochastic-rounding", "false", "--quantization_seed", "9",
    ]  # fmt: skip
    parser = HfArgumentParser(QFTTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", "--use_cpu", *flags])
    assert args.optimizer_fields == {
        "gradient": "release", "clipping": "tensor", "momentum_bits": 4,
        "beta2": 0.98, "stochastic_rounding": False, "seed": 9,
    }  # fmt: skip
    (plain,) = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", "--use_cpu"])
    assert plain.optimizer_fields == plain.format_fields == {}
    text = " ".join(parser.format_help().split())
    assert "Default: 0.99 (qft_lion), 0.999 (qft_adamw)." in text


# --- optim_args -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentum=4", "has 'momentum=4'; qft_lion takes accumulation, beta1"),
        ("seed=x", "has 'seed=x'; seed must be an integer"),
        ("beta2=high", "has 'beta2=high'; beta2 must be a number"),
        ("stochastic_rounding=2", "stochastic_rounding must be true or false"),
        ("beta2=nan", "beta2 must be a finite number"),
        ("beta2=0.9,", "has ''; qft_lion takes"),
        ("gradient", "has 'gradient'|gradient must be 'stack'"),
        ("beta2=0.9, beta2=0.95", r"has beta2 twice\. Give it once"),
        ("gradient=stak", "gradient must be 'stack' or 'release'"),
        ("beta2=2", r"betas must be two numbers in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_bad_optim_args_are_refused_before_the_model_changes(cls, text, message, tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        trainer_on(model, tmp_path, cls, optim_args=text)
    assert type(model.lm_head) is nn.Linear


def test_a_field_and_optim_args_may_agree_and_not_differ(tmp_path):
    args = by_field(tmp_path, {"beta2": 0.97, "seed": 5}, optim_args="beta2=0.97,seed=5")
    assert args.quantization_config.seed == 5
    assert by_field(tmp_path, {}, optim_args="seed=6").quantization_config.seed == 6
    with pytest.raises(ValueError, match=r"has beta2=0\.98, and beta2=0\.97 was given too"):
        by_field(tmp_path, {"beta2": 0.97}, optim_args="beta2=0.98")
    with pytest.raises(ValueError, match="has seed=6, and quantization_seed=5 was given too"):
        by_field(tmp_path, {"seed": 5}, optim_args="seed=6")


@pytest.mark.parametrize("make", [by_field, by_text, by_text_beside_fields])
def test_the_seed_is_that_of_model_and_optimizer(make, tmp_path):
    trainer = Trainer(model=tiny_llama(), args=make(tmp_path, {"seed": 11}))
    assert trainer.model.config.quantization_config.seed == 11
    assert trainer.create_optimizer().defaults["seed"] == 11
    # A model that is INT8 already keeps its own seed unless another one is given.
    for given, seed in (({}, 4), ({"seed": 11}, 11)):
        model = quantize_model_(tiny_llama(), QFTConfig(seed=4))
        optimizer = Trainer(model=model, args=make(tmp_path, given)).create_optimizer()
        assert optimizer.defaults["seed"] == seed


# --- values of the stock arguments ----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-3])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
def test_impossible_numbers_are_refused_by_name(name, bad, tmp_path):
    if (name, bad) == ("max_grad_norm", math.inf):
        return  # no clipping, as in torch
    with pytest.raises(ValueError, match=rf"{name} must .*, got {bad}"):
        arguments(tmp_path, QFTTrainingArguments, **{name: bad})
    for cls in (Trainer, QFTTrainer):
        model = tiny_llama()
        with pytest.raises(ValueError, match=rf"{name} must .*, got {bad}"):
            trainer_on(model, tmp_path, cls, **{name: bad})
        assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_number_that_is_infinite_in_fp32_is_refused_with_the_arguments(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be in .* FP32, got 1e\+39"):
        arguments(tmp_path, QFTTrainingArguments, **{name: 1e39})


@pytest.mark.parametrize("bad", ["1", None])
def test_a_norm_that_is_no_number_is_refused_by_name(bad, tmp_path):
    """None failed in the Trainer's comparison with 0, after released gradients were used."""
    with pytest.raises(TypeError, match=f"max_grad_norm must be a number, got {bad!r}"):
        arguments(tmp_path, QFTTrainingArguments, max_grad_norm=bad)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_an_infinite_norm_measures_and_clips_nothing_in_both_modes(cls, tmp_path):
    """With `release` it was refused: it must be positive, got inf."""
    runs = []
    for options in ({}, {"gradient": "release"}):
        args = by_text(tmp_path, options, max_grad_norm=math.inf)
        runs.append(cls(model=tiny_llama(), args=args, train_dataset=sequences()))
        runs[-1].train()
    stack, release = runs
    assert_same_state(stack.model, release.model)
    # Sums of squares in another order.
    assert history(release, "grad_norm") == pytest.approx(history(stack, "grad_norm"), rel=1e-6)
    plain = trainer_on(tiny_llama(), tmp_path, cls, max_grad_norm=0)
    plain.train()
    assert_same_state(stack.model, plain.model)


def test_a_rate_that_is_set_later_is_checked_when_the_optimizer_is_made(tmp_path):
    trainer = trainer_on(tiny_llama(), tmp_path)
    trainer.args.learning_rate = math.nan  # as a hyperparameter search might
    with pytest.raises(ValueError, match="learning_rate must be a finite number, got nan"):
        trainer.train()


@pytest.mark.parametrize(
    ("optim", "rate", "warns"),
    [
        ("qft_lion", None, True),
        ("qft_lion", 1e-4, False),
        ("qft_adamw", None, False),
        ("qft_sgd", None, False),
    ],
)
@pytest.mark.parametrize("cls", [TrainingArguments, QFTTrainingArguments])
def test_a_default_that_is_too_high_for_the_optimizer_is_reported(
    cls, optim, rate, warns, tmp_path, caplog
):
    """The stock default, 5e-5, is five times the one that suits Lion."""
    if optim == "qft_sgd" and cls is QFTTrainingArguments:
        rate = 1e-3  # it has no default there
    given = {} if rate is None else {"learning_rate": rate}
    args = cls(tmp_path, optim=optim, max_steps=1, report_to="none", use_cpu=True, **given)
    Trainer(tiny_llama(), args, train_dataset=sequences(8)).train()
    is_reported = "the default of QFTTrainingArguments" in caplog.text
    assert is_reported == (warns and cls is TrainingArguments)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("adam_beta1", 0.8, r"Set beta1=0\.8 in QFTTrainingArguments, or optim_args='beta1=0\.8'"),
        ("adam_beta2", 0.95, r"Set beta2=0\.95 in"),
        ("adam_epsilon", 1e-6, "Leave it out|Set eps="),
        ("optim_target_modules", ["q_proj"], "Leave it out"),
    ],
)
@pytest.mark.parametrize("name_of_optimizer", OPTIMIZERS)
def test_fields_of_other_optimizers_are_refused(name, value, advice, name_of_optimizer, tmp_path):
    taken = OPTIMIZERS[name_of_optimizer].options
    if name.startswith("adam_beta") and name.removeprefix("adam_") not in taken:
        advice = "Leave it out"
    message = rf"{name_of_optimizer} does not read {name}, got .*{advice}"
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, QFTTrainingArguments, optim=name_of_optimizer, **{name: value})
    with pytest.raises(ValueError, match=message):
        trainer_on(tiny_llama(), tmp_path, optim=name_of_optimizer, **{name: value})


# --- options without an effect --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "norm", "message"),
    [
        ({"accumulation": "forbid"}, 0, "is for gradient='release'.*Set gradient='release'"),
        ({"gradient": "stack", "accumulation": "forbid"}, 0, "or leave accumulation out"),
        (
            {"clipping": "tensor"},
            1,
            "got clipping='tensor' .* Leave them out: with gradient='stack'",
        ),
        ({"gradient": "release", "clipping": "tensor"}, 0, "clipping='tensor'. Set both"),
        ({"gradient": "release"}, 1, r"clipping='exact' .* 'previous' .* or 'tensor'"),
        ({"gradient": "release", "nonfinite": "skip"}, 0, "Use nonfinite='raise', or gradient='st"),
        ({"momentum_bits": 0}, 1, "momentum_bits=0 is not Lion but SGD: .* optim='qft_sgd'"),
    ],
)
def test_combinations_without_an_effect_are_refused(options, norm, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        by_field(tmp_path, options, max_grad_norm=norm)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        Trainer(model=model, args=by_text(tmp_path, options, max_grad_norm=norm))
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient": "release"}, {"beta2": 0.98}, {"quantization_seed": 1}, {"chunked_loss": True},
        {"cuda_graph": True},
        {"group_size": 16}, {"outlier_fraction": 0.01}, {"matmul": "dequantize"},
        {"modules_to_not_convert": ["lm_head"]}, {"stochastic_rounding": False},
    ],
    ids=str,
)  # fmt: skip
def test_another_optimizer_has_no_use_for_any(fields, tmp_path):
    with pytest.raises(
        ValueError, match=rf"leaves {next(iter(fields))} without .*or set optim='qft_"
    ):
        arguments(tmp_path, QFTTrainingArguments, optim="adamw_torch", **fields)


def test_deepspeed_is_refused_before_its_installation_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="Remove deepspeed"):
        arguments(tmp_path, QFTTrainingArguments, deepspeed="zero.json")


def test_another_optimizer_may_have_our_arguments(tmp_path):
    args = arguments(tmp_path, QFTTrainingArguments, optim="adamw_torch", adam_beta2=0.95)
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=sequences())
    trainer.train()
    assert type(trainer.model.lm_head) is nn.Linear
    assert trainer.optimizer.optimizer.defaults["betas"] == (0.9, 0.95)


def test_int8_products_want_matmul_int8(tmp_path):
    products = {"lm_head": ["forward"]}
    for make in (QFTConfig, lambda **kw: arguments(tmp_path, QFTTrainingArguments, **kw)):
        with pytest.raises(ValueError, match="Set matmul='int8', or leave int8_products out"):
            make(int8_products=products)


FORMAT = QFTConfig(group_size=11, outlier_fraction=0.03, modules_to_not_convert=["lm_head"], seed=3)
PRODUCTS = QFTConfig(matmul="int8", outlier_fraction=0.03, int8_products={"o_proj": []}, seed=3)


@pytest.mark.parametrize(
    ("config", "field", "same", "other"),
    [
        (FORMAT, "group_size", 11, 12),
        (FORMAT, "outlier_fraction", 0.03, 0.01),
        (FORMAT, "modules_to_not_convert", ["lm_head"], ["q_proj"]),
        (FORMAT, "matmul", "dequantize", "int8"),
        (PRODUCTS, "matmul", "int8", "dequantize"),
        (PRODUCTS, "int8_products", {"o_proj": []}, {"q_proj": []}),
        (PRODUCTS, "quantization_seed", 3, 4),
    ],
)
@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_format_that_is_not_that_of_an_int8_model_is_refused(
    config, field, same, other, cls, tmp_path
):
    beside = {"matmul": "int8"} if field == "int8_products" else {}
    for value in (same, other):
        model = quantize_model_(tiny_llama(), config)
        args = arguments(tmp_path, QFTTrainingArguments, **{field: value} | beside)
        if value == same:
            cls(model=model, args=args)
            continue
        with pytest.raises(ValueError, match=r"asked for, and the model is INT8 already, with .*"):
            cls(model=model, args=args)


class Plain(nn.Module):
    """A model of no library, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(131, 24)
        self.head = nn.Linear(24, 131)

    def forward(self, input_ids, labels, **kwargs):
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize(
    ("field", "same", "other"),
    [("group_size", 8, 12), ("outlier_fraction", 0.1, 0.2), ("matmul", "dequantize", "int8")],
)
def test_a_format_shows_where_no_config_records_it(field, same, other, tmp_path):
    fields = {"group_size": 8, "outlier_fraction": 0.1}
    args = arguments(tmp_path, QFTTrainingArguments, **fields)
    trainer = QFTTrainer(model=Plain(), args=args, train_dataset=sequences())
    trainer.train()
    QFTTrainer(model=trainer.model, args=arguments(tmp_path, QFTTrainingArguments, **{field: same}))
    changed = arguments(tmp_path, QFTTrainingArguments, **{field: other})
    with pytest.raises(ValueError, match=rf"{field}={other!r} was asked .* already, with {field}="):
        QFTTrainer(model=trainer.model, args=changed)


def test_a_model_without_any_matrix_to_quantize_says_so(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 4, 5))
    with pytest.raises(ValueError, match=r"of Sequential can be INT8.*ordinary optimizer"):
        trainer_on(model, tmp_path)


def test_options_beside_an_optimizer_that_was_passed_are_refused(tmp_path):
    for cls in (Trainer, QFTTrainer):
        model = quantize_model_(tiny_llama(), QFTConfig())
        optimizer = QFTLion(model.parameters())
        with pytest.raises(ValueError, match="beta2 were set, which only an optimizer made by the"):
            cls(model=model, args=by_text(tmp_path, {"beta2": 0.9}), optimizers=(optimizer, None))


def test_qft_trainer_refuses_a_foreign_optimizer_before_the_model_changes(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="Pass no optimizer, or a QFTLion"):
        QFTTrainer(model=model, args=arguments(tmp_path), optimizers=(optimizer, None))
    assert type(model.lm_head) is nn.Linear


# --- one place that prepares a model --------------------------------------------------------


def model_init_trainer(folder: Path, cls: type, make, **fields) -> Trainer:
    args = arguments(folder, QFTTrainingArguments, **fields)
    return cls(model_init=make, args=args, train_dataset=sequences())


@pytest.mark.parametrize("way", ["model", "model_init"])
def test_float_weights_never_reach_the_device(way, tmp_path, monkeypatch):
    moved = []

    def move(self, model, device):
        moved.append({type(module) for module in model.modules()})
        return model.to(device)

    monkeypatch.setattr(Trainer, "_move_model_to_device", move)
    given = {"model": tiny_llama()} if way == "model" else {"model_init": lambda: tiny_llama()}
    QFTTrainer(args=arguments(tmp_path), train_dataset=sequences(), **given).train()
    assert len(moved) == (1 if way == "model" else 2)
    assert not any({nn.Linear, nn.Embedding} & classes for classes in moved)


def test_asking_for_the_optimizer_changes_no_model(tmp_path):
    model = tiny_llama()
    for cls in (Trainer, QFTTrainer):
        with pytest.raises(ValueError, match="No weight of LlamaForCausalLM is INT8"):
            cls.get_optimizer_cls_and_kwargs(arguments(tmp_path), model)
    assert type(model.lm_head) is nn.Linear
    found, kwargs = QFTTrainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), None)
    assert (found, kwargs["lr"]) == (QFTLion, 1e-3)


@pytest.mark.parametrize("resume", [False, True])
def test_a_float_model_that_the_stock_trainer_makes_itself_is_refused(resume, tmp_path):
    if resume:
        trainer_on(tiny_llama(), tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = model_init_trainer(tmp_path, Trainer, lambda: tiny_llama())
    with pytest.raises(ValueError, match=r"have model_init call .* or use qft_hf\.QFTTrainer"):
        trainer.train(resume_from_checkpoint=resume or None)


@pytest.mark.parametrize("fields", [{}, {"group_size": 11}, {"chunked_loss": True}], ids=str)
def test_a_model_init_that_does_what_the_stock_trainer_says_is_accepted(fields, tmp_path):
    """A format of the arguments was refused as another one after the advice was followed."""
    args = arguments(tmp_path, QFTTrainingArguments, **fields)
    steps = []

    def make():
        model = tiny_llama()
        for step in steps:
            eval(step, globals(), {"model": model, "args": args})
        return model

    trainer = Trainer(model_init=make, args=args, train_dataset=sequences())
    for _ in range(2 if "chunked_loss" in fields else 1):
        with pytest.raises(ValueError, match="have model_init") as refused:
            trainer.train()
        steps += re.findall(r"call (\w+_\(.*?\)), or", str(refused.value))
    trainer.train()
    assert steps[0] == "quantize_model_(model, args.quantization_config)"
    assert trainer.model.config.quantization_config == args.quantization_config


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_of_model_init_trains_to_the_same_bits(resume, tmp_path):
    settings = {"group_size": 11, "save_strategy": "steps", "save_steps": 3}
    args = arguments(tmp_path, QFTTrainingArguments, **settings)
    straight = QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())
    straight.train()
    trainer = model_init_trainer(tmp_path, QFTTrainer, lambda: tiny_llama(), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
    assert_same_state(straight.model.state_dict(), trainer.model.state_dict())


def test_the_ledger_of_a_second_run_is_that_of_its_own_model(tmp_path):
    """The ledger of the first run was kept if its model was larger, as in a search of sizes."""
    widths = iter([150, 150, 75])  # one model when the Trainer is made, and one for each run
    trainer = model_init_trainer(
        tmp_path, QFTTrainer, lambda: tiny_llama(intermediate_size=next(widths)), max_steps=2
    )
    for _ in range(2):
        trainer.train()
        n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        assert trainer.ledger.n_parameters == n_parameters


def test_the_stock_trainer_trains_what_model_init_has_quantized(tmp_path):
    def make():
        return quantize_model_(tiny_llama(), QFTConfig(group_size=11))

    trainer = model_init_trainer(tmp_path, Trainer, make, group_size=11)
    trainer.train()
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]
    # The first model of `make` agrees with the arguments, and the next one does not.
    configs = iter([QFTConfig(group_size=11), QFTConfig(group_size=12)])
    changing = model_init_trainer(
        tmp_path, Trainer, lambda: quantize_model_(tiny_llama(), next(configs)), group_size=11
    )
    with pytest.raises(ValueError, match="INT8 already, with group_size=12"):
        changing.train()


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_chunked_loss_in_either_trainer(cls, tmp_path):
    args = arguments(tmp_path, QFTTrainingArguments, chunked_loss=True)
    trainer = cls(model=tiny_llama(), args=args, train_dataset=sequences())
    trainer.train()
    assert trainer.model.lm_head.defers_logits
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


def test_a_chunked_loss_of_a_model_that_model_init_makes(tmp_path):
    trainer = model_init_trainer(tmp_path, QFTTrainer, lambda: tiny_llama(), chunked_loss=True)
    trainer.train()
    assert trainer.model.lm_head.defers_logits
    stock = model_init_trainer(
        tmp_path, Trainer, lambda: quantize_model_(tiny_llama(), QFTConfig()), chunked_loss=True
    )
    with pytest.raises(ValueError, match=r"have model_init also call chunk_loss_\(model\)"):
        stock.train()


@pytest.mark.parametrize(
    ("name", "value"), [("outlier_fraction", 0.1), ("matmul", "int8"), ("chunked_loss", True)]
)
def test_a_trial_of_a_search_has_a_model_of_its_own_format(name, value, tmp_path):
    """Its model was made in the format of the trial before, and then refused."""
    trainer = model_init_trainer(tmp_path, QFTTrainer, lambda: tiny_llama())
    trainer.hp_search_backend = HPSearchBackend.OPTUNA  # which need not be installed
    trainer.hp_space = lambda trial: trial.params

    model = trainer.call_model_init(SimpleNamespace(params={name: value}))

    of_head = {"chunked_loss": model.lm_head.defers_logits}
    assert (vars(model.config.quantization_config) | of_head)[name] == value


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"beta2": 0.97}, {"beta2": 0.98}, r"beta2=0\.98 was given, .* uses 0\.97.*Give beta2="),
        ({}, {"beta1": 0.8}, r"beta1=0\.8 was given, and the optimizer uses 0\.9, which"),
        ({"seed": 5}, {"seed": 6}, "quantization_seed=6 was given, and the optimizer uses 5"),
        ({}, {"stochastic_rounding": False}, "stochastic_rounding=False .* uses True"),
        ({}, {"weight_decay": 0.2}, r"weight_decay=0\.2 was given, .* uses 0\.1"),
        ({}, {"learning_rate": 2e-3}, r"learning_rate=0\.002 was given, .* uses 0\.001"),
    ],
    ids=str,
)
def test_an_option_that_the_checkpoint_would_overrule_is_refused(first, second, message, tmp_path):
    def trainer(options):
        options = {FIELDS.get(name, name): value for name, value in options.items()}
        args = arguments(
            tmp_path, QFTTrainingArguments, save_strategy="steps", save_steps=3, **options
        )
        return QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())

    trainer(first).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=message):
        trainer(second).train(resume_from_checkpoint=checkpoint)
    again = trainer(first)
    again.train(resume_from_checkpoint=checkpoint)
    left_out = trainer({"seed": 5} if "seed" in first else {})
    left_out.train(resume_from_checkpoint=checkpoint)
    assert_same_state(again.model.state_dict(), left_out.model.state_dict())


@dataclass
class OfAnotherLibrary(TrainingArguments):
    """TRL's arguments have default rates of their own, too."""

    learning_rate: float = 2e-5


@pytest.mark.parametrize("kind", [TrainingArguments, QFTTrainingArguments, OfAnotherLibrary])
def test_a_rate_that_is_left_out_is_that_of_the_checkpoint(kind, tmp_path):
    """The error said to leave the rate out; the default that took its place was refused, too."""

    def trainer(rate):
        args = arguments(tmp_path, kind, learning_rate=rate, save_strategy="steps", save_steps=3)
        return QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())

    straight = trainer(1e-3)
    straight.train()
    with pytest.raises(ValueError, match=r"Give learning_rate=0\.001 or leave it out"):
        trainer(2e-3).train(str(tmp_path / "checkpoint-3"))
    resumed = trainer(kind.__dataclass_fields__["learning_rate"].default)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())


def test_a_rate_that_equals_the_default_is_compared_if_it_was_given(tmp_path):
    def trainer(rate):
        fields = {"learning_rate": rate, "save_strategy": "steps", "save_steps": 3}
        args = arguments(tmp_path, QFTTrainingArguments, **fields)
        return QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())

    trainer(1e-3).train()
    with pytest.raises(ValueError, match="learning_rate=1e-05 was given"):
        trainer(1e-5).train(str(tmp_path / "checkpoint-3"))


def test_groups_of_ones_own_may_have_rates_of_their_own(tmp_path):
    class Layered(QFTTrainer):
        def create_optimizer(self, model=None):
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [p],
                    "lr": self.args.learning_rate * 0.8 ** (i + 1),
                    "weight_decay": 0.013 * i,
                }
                for i, p in enumerate(self.model.parameters())
            ]
            self.optimizer = cls(groups, **kwargs)
            return self.optimizer

    settings = {"save_strategy": "steps", "save_steps": 3}
    trainer_on(tiny_llama(), tmp_path, Layered, **settings).train()
    resumed = trainer_on(tiny_llama(), tmp_path, Layered, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_run_with_an_optimizer_of_ones_own_can_be_resumed(cls, tmp_path):
    """The arguments' unused values were once taken for values that the checkpoint overrides."""

    def trainer(**options):
        model = quantize_model_(tiny_llama(), QFTConfig())
        own = QFTLion(model.parameters(), lr=3e-3, weight_decay=0.03)
        return cls(
            model=model, optimizers=(own, None), train_dataset=sequences(),
            args=arguments(tmp_path, save_strategy="steps", save_steps=2, **options),
        )  # fmt: skip

    straight, again = trainer(), trainer()
    straight.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(straight.model.state_dict(), again.model.state_dict())
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # of the resumed one


def test_a_rate_that_was_left_out_once_is_compared_with_the_first_one(tmp_path):
    def trainer(**options):
        options = {"save_strategy": "steps", "save_steps": 2, **options}
        return trainer_on(tiny_llama(), tmp_path, QFTTrainer, **options)

    default = arguments(tmp_path).__dataclass_fields__["learning_rate"].default
    trainer().train()
    trainer(learning_rate=default).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"learning_rate=0\.002 was given, .* uses 0\.001"):
        trainer(learning_rate=2e-3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# --- an optimizer with released gradients that the user has made ----------------------------


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_released_gradients_of_ones_own_optimizer_accumulate(cls, tmp_path):
    """The second micro-batch once raised, after the first one had updated weights."""
    states = []
    for gradient in ("stack", "release"):
        model = quantize_model_(tiny_llama(), QFTConfig())
        own = QFTLion(model.parameters(), lr=1e-3, weight_decay=0.1, gradient=gradient)
        args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0)
        trainer = cls(model=model, args=args, optimizers=(own, None), train_dataset=sequences())
        trainer.train()
        states.append(model.state_dict())
    assert_same_state(*states)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_norm_that_ones_own_optimizer_would_not_clip_to_is_refused(cls, tmp_path):
    """The Trainer's default, 1.0, once clipped nothing without an error."""

    def trainer(**settings):
        model = quantize_model_(tiny_llama(), QFTConfig())
        own = QFTLion(model.parameters(), gradient="release", **settings)
        args = arguments(tmp_path, max_steps=1)
        return cls(model=model, args=args, optimizers=(own, None), train_dataset=sequences())

    with pytest.raises(ValueError, match=r"got max_grad_norm=1\.0 and .*max_grad_norm=0 in"):
        trainer().train()
    trainer(clipping="previous", max_grad_norm=0.3).train()


# --- what cannot be done over ---------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_float16_evaluation_is_refused(cls, tmp_path):
    with pytest.raises(ValueError, match="Use bf16_full_eval=True, or leave it off"):
        trainer_on(tiny_llama(), tmp_path, cls, fp16_full_eval=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fp16": True}, "Use bf16=True, which needs no scaling"),
        ({"fsdp": "full_shard"}, "Remove fsdp"),
        *(
            ({"parallelism_config": ParallelismConfig(**{size: 2})}, "Leave them out. On several")
            for size in ("dp_shard_size", "cp_size", "sp_size")
        ),
    ],
)
def test_what_no_model_can_be_trained_with_is_refused_with_the_arguments(
    overrides, message, tmp_path
):
    """A run that asked for fp16 read its data and loaded its model before it was refused."""
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, QFTTrainingArguments, **overrides)


def test_released_gradients_cannot_be_tried_again_with_a_smaller_batch(tmp_path):
    settings = {"auto_find_batch_size": True, "max_grad_norm": 0}
    message = "Set auto_find_batch_size=False"
    with pytest.raises(ValueError, match=message):
        by_field(tmp_path, {"gradient": "release"}, **settings)
    with pytest.raises(ValueError, match=message):
        Trainer(model=tiny_llama(), args=by_text(tmp_path, {"gradient": "release"}, **settings))
    model = quantize_model_(tiny_llama(), QFTConfig())
    own = QFTLion(model.parameters(), gradient="release")
    trainer = Trainer(
        model=model, args=arguments(tmp_path, **settings), optimizers=(own, None),
        train_dataset=sequences(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_stacked_gradients_are_tried_again_with_a_smaller_batch(tmp_path):
    """Memory runs out in backward, half-way through the layers."""

    def break_once(model, limit):
        def forward_hook(module, inputs, output):
            if len(output) > limit and output.requires_grad:
                output.register_hook(raise_out_of_memory)

        model.model.layers[0].mlp.register_forward_hook(forward_hook)

    def raise_out_of_memory(gradient):
        raise RuntimeError("CUDA out of memory.")

    broken = tiny_llama()
    break_once(broken, limit=3)
    retried = trainer_on(broken, tmp_path, auto_find_batch_size=True)
    retried.train()
    size = retried._train_batch_size
    assert size < 4
    # The card, and the comparison when a run resumes, once had the size that did not fit.
    assert hyperparameters_of(retried)["examples a step"] == size
    assert retried.state.stateful_callbacks[SAVED]["examples_per_step"] == size
    plain = trainer_on(tiny_llama(), tmp_path, per_device_train_batch_size=size)
    plain.train()
    assert_same_state(plain.model.state_dict(), broken.state_dict())


# --- adapters -------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Stands for an adapter: float parameters next to a frozen INT8 layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted_llama():
    model = quantize_model_(tiny_llama(), QFTConfig()).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)
    return model


def test_adapters_on_frozen_int8_weights_train_as_on_the_same_weights_in_float(tmp_path):
    losses = []
    for is_float in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = adapted_llama()
        if is_float:
            model = dequantize_model_(model, torch.float32)
        frozen = {n: v.clone() for n, v in model.state_dict().items() if "down_proj" not in n}
        trainer = trainer_on(model, tmp_path, optim="adamw_torch", max_steps=20, learning_rate=0.02)
        trainer.train()
        losses.append(history(trainer, "loss"))
        after = model.state_dict()
        assert [n for n, v in frozen.items() if not torch.equal(v, after[n])] == []
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # fp32 sums in another order
    assert trainer.model.model.layers[0].mlp.down_proj.up.weight.abs().max() > 0.05


def test_an_int8_weight_that_is_not_frozen_still_needs_its_optimizer(tmp_path):
    model = adapted_llama()
    model.lm_head.weight.requires_grad_(True)
    trainer = trainer_on(model, tmp_path, optim="adamw_torch")
    with pytest.raises(TypeError, match=r"1 INT8 weights \(lm_head\.weight, .*or freeze them"):
        trainer.train()


# --- default dtype --------------------------------------------------------------------------


FIELDS_BY_CASE = [
    {},
    {"gradient": "release", "max_grad_norm": 0},
    {"matmul": "int8"},
    {"momentum_bits": 4, "chunked_loss": True},
    {"group_size": 11, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("fields", FIELDS_BY_CASE, ids=str)
def test_the_default_dtype_changes_no_bit(fields, tmp_path, request):
    states = []
    models = [tiny_llama(tied=True), tiny_llama(tied=True)]
    for model in models:
        args = arguments(tmp_path, QFTTrainingArguments, max_steps=2, **fields)
        QFTTrainer(model=model, args=args, train_dataset=sequences()).train()
        states.append(model.state_dict())
        if len(states) == 1:
            request.getfixturevalue("default_bf16")
    assert_same_state(*states)
