"""Trainers of runs that are compared: ours, and the stock one with FP32 weights or adapters."""

from argparse import Namespace
from collections.abc import Iterable

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import Trainer, set_seed

from qft_hf.hf.finetune import RunArguments, parse_arguments, prepare
from qft_hf.hf.finetune.loading import load_model
from qft_hf.hf.finetune.preparation import read

LORA_RANK = 16


class Lion(torch.optim.Optimizer):
    """Lion in FP32 without weight decay: Chen et al. 2023, algorithm 2 (arXiv:2302.06675)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                direction = momentum.lerp(parameter.grad, 0.1).sign_()
                parameter.sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 0.01)


def compared_trainer(way: str, config: str, flags: list[str]) -> Trainer:
    """Return the Trainer of a run that is not scored while it trains, and writes no checkpoints.

    Args:
        way: "FP32 AdamW" or "FP32 Lion" for the stock Trainer, "LoRA" for the same with AdamW and
            adapters on every linear layer except the head; by any other name it is ours.
        config: Name of a shipped config.
        flags: Flags of `qft-hf finetune`, which override the config.
    """
    fixed = ["--eval_strategy=no", "--save_strategy=no", "--overwrite_output"]
    arguments = parse_arguments([config, *fixed, *flags])
    if way in ("FP32 AdamW", "FP32 Lion", "LoRA"):
        return _stock_trainer(arguments, way)
    return prepare(arguments).trainer


def asset_flags(options: Namespace, model: str, data: str) -> list[str]:
    """Return the flags for fetched assets in `options.data`, and for the folder of the run."""
    return [
        f"--model_name_or_path={options.data / model}",
        f"--train_data={options.data / data / 'train.jsonl'}",
        f"--eval_data={options.data / data / 'eval.jsonl'}",
        f"--output_dir={options.output / 'trainer'}",
    ]


def _stock_trainer(arguments: RunArguments, way: str) -> Trainer:
    """Return the stock Trainer, with the model, data and seed that `prepare` would use."""
    _, start, data = read(arguments)
    training = arguments.training
    model = load_model(start.model, None, start.config, data.task)
    if way == "LoRA":
        generates = arguments.data.task in ("chat", "text")
        task = TaskType.CAUSAL_LM if generates else TaskType.SEQ_CLS
        set_seed(training.seed)
        model = get_peft_model(model, LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=task
        ))  # fmt: skip
    training.optim = "adamw_torch"
    is_lion = way == "FP32 Lion"
    lion = Lion(model.parameters(), lr=training.learning_rate) if is_lion else None
    return Trainer(
        model=model,
        args=training,
        **data.of_trainer,
        optimizers=(lion, None),
    )
