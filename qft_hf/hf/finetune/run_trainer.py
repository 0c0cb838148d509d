"""The Trainer of a run: it counts the tokens of the examples themselves.

A batch does not tell how many it has. Blocks of packed examples have no mask, and neither have the
batches of some tokenizers; and where padding is the end-of-text token, the end of a text is no
padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from ..trainer import QFTTrainer

N_TOKENS = "n_tokens"  # of each example, beside the model's inputs: int64, `[batch]`


class RunTrainer(QFTTrainer):
    """Counts in `state.num_input_tokens_seen` every token that is not padding.

    Args:
        data_collator: Makes a batch of examples, which have `input_ids`.
        **kwargs: As of `QFTTrainer`.
    """

    def __init__(self, *, data_collator: Callable[[Any], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(data_collator=partial(_counted, data_collator), **kwargs)
        take_means_for_means_(self)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository that the run is pushed to, or raise before anything is trained.

        Raises:
            ValueError: The Hub cannot be reached, or does not let us.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the network, the Hub and its library alike
            raise ValueError(
                "push_to_hub is set, and the Hub does not give a repository: "
                f"{str(error).rstrip('.')}. Log in with "
                "`hf auth login`, correct hub_model_id, or leave push_to_hub out, and upload the "
                "finished folder by `hf upload`."
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card of the run, which is there when it is pushed and tells more."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        of_model = {name: value for name, value in inputs.items() if name != N_TOKENS}
        prepared: dict[str, Any] = super()._prepare_inputs(of_model)
        return prepared

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        n_tokens = inputs[N_TOKENS].sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(n_tokens).sum())


def take_means_for_means_(trainer: Trainer) -> None:
    """Have losses that are means of a batch averaged over processes and micro-batches.

    Those of classifiers are, and maybe those of a model whose code comes with it. The Trainer takes
    the loss of a model that accepts any argument for a share of one that is divided by all labels
    of a step, and sums them up.
    """
    model: Any = trainer.model
    if trainer.model_accepts_loss_kwargs and not _divides_by_all_labels(model):
        trainer.model_accepts_loss_kwargs = False


def _divides_by_all_labels(model: Any) -> bool:
    """Whether the loss is divided by the number of labels of a step, where that is given."""
    if type(model).__module__.startswith("transformers."):
        return bool(model.can_generate())
    was_training = model.training
    model.eval()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        of_one, of_two = (
            model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(n)).loss
            for n in (1, 2)
        )
    model.train(was_training)
    return not of_one.equal(of_two)


def _counted(
    collate: Callable[[Any], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    n_tokens = torch.tensor([len(example["input_ids"]) for example in examples])  # they may change
    return {**collate(examples), N_TOKENS: n_tokens}
