"""Quantizes the reference model of a run if the policy that it is compared with is INT8.

Trainers for preferences and rewards, such as TRL's, load a float reference model from the
policy's checkpoint, and have Accelerate move it to the device. Before that, the reference is
quantized like the policy: it takes a fourth of the memory and has the policy's initial values.
"""

import logging
from typing import Any
from weakref import ref

from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from ..side import side_network_of
from .compatibility import has_quantized_weights, quantization_config_of
from .convert import quantize_model_

logger = logging.getLogger(__name__)

TRAINER = "_qft_trainer"  # attribute of an accelerator: a weak reference


def trainer_of(accelerator: Accelerator) -> Trainer | None:
    """Return the Trainer that made an accelerator; None in the user's own training loop."""
    trainer: Trainer | None = getattr(accelerator, TRAINER, lambda: None)()
    return trainer


def telling_the_trainer(create: Any, self: Trainer) -> None:
    """Make each accelerator know its Trainer."""
    create(self)
    setattr(self.accelerator, TRAINER, ref(self))


def quantizing_references(
    prepare: Any, self: Accelerator, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Quantize a reference model before it is moved to the device."""
    trainer: Any = trainer_of(self)
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and model is reference:
        quantize_as_policy_(reference, trainer.model)
        _warn_of_another_start(reference, trainer.model)
    return prepare(self, model, *args, **kwargs)


def _warn_of_another_start(reference: nn.Module, policy: nn.Module) -> None:
    """Warn if a policy starts from a trained side network, and its reference from the base."""
    network = side_network_of(policy)
    if network is not None and side_network_of(reference) is None and bool(network.upsample.any()):
        logger.warning(
            "The policy has a trained side network and the reference model has none, so they "
            "differ from the start. For a reference that is the policy before training, pass "
            "ref_model=load_side_network(base, folder) with the folder of this side network"
        )


def quantize_as_policy_(reference: nn.Module, policy: nn.Module) -> None:
    """Quantize a float reference in the format of an INT8 policy, if both are of one class."""
    config = quantization_config_of(policy)
    if (
        config is not None
        and type(reference) is type(policy)
        and not has_quantized_weights(reference)
    ):
        quantize_model_(reference, config)
        logger.warning(
            "The reference model, a float %s, was quantized to INT8, like the policy",
            type(reference).__name__,
        )
