"""The FP32 baseline of a config: the same run with FP32 weights in the stock Trainer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from qft_hf.hf.finetune import RunArguments
from qft_hf.hf.finetune.loading import load_model
from qft_hf.hf.finetune.preparation import read


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


def float_trainer(arguments: RunArguments, optimizer: str, **more: Any) -> Trainer:
    """Return the stock Trainer of a run, with the model, data and seed that `prepare` would use.

    Args:
        arguments: Arguments of the run; its `optim` is ignored.
        optimizer: "AdamW" or "Lion", with the learning rate of the run.
        more: Further arguments of the Trainer.
    """
    _, config, data = read(arguments)
    training = arguments.training
    model = load_model(
        arguments.model, None, config, data.task, max_length=arguments.data.max_length
    )
    training.optim = "adamw_torch"
    lion = Lion(model.parameters(), lr=training.learning_rate) if optimizer == "Lion" else None
    return Trainer(
        model=model,
        args=training,
        train_dataset=data.train.dataset,
        eval_dataset=data.evaluation.dataset if data.evaluation else None,
        data_collator=data.task.collator,
        processing_class=data.task.tokenizer,
        compute_metrics=data.task.scoring.compute_metrics,
        preprocess_logits_for_metrics=data.task.scoring.preprocess_logits,
        optimizers=(lion, None),
        **more,
    )
