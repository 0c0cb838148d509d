"""Every class of transformers that holds experts in one parameter, or derives from nn.Embedding.

They are built alone, of toy sizes and without storage: whether one is found by its form is asked of
its parameters and its forward.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from qft_hf.nn import conversion_plan

MODELS = Path(transformers.__file__).parent / "models"
# Two experts beside 256 others, that every token meets: 0.8 % of them. Aria's have the usual form
# in newer versions of transformers; those of 5.17 stay float, and a warning says so.
OF_OTHER_FORM = {"InklingSharedExperts", "AriaGroupedExpertsGemm"}


def size(name: str) -> float:
    """Of what is called so; 0 for probabilities and for tokens."""
    return 0 if "drop" in name or "pad" in name else 8


class Sizes:
    """A configuration in which whatever is asked for is there."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return "silu" if "act" in name else size(name)


def classes(*names: str, base: str = "") -> list[type[nn.Module]]:
    """Those whose name has one of `names` in it, or that derive from `base`, of all models."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        tree = ast.parse(path.read_text())
        wanted = [
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            and (
                any(name in node.name for name in names)
                or (base and base in map(ast.unparse, node.bases))
            )
        ]
        if wanted:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [getattr(module, name) for name in wanted]
    return found


def built(cls: type[nn.Module]) -> nn.Module:
    """A module of toy sizes on the meta device."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = [Sizes() if p.name == "config" else size(p.name) for p in needed]
    with torch.device("meta"):
        return cls(*arguments)


@pytest.mark.slow
def test_all_experts_of_transformers_are_int8_but_for_those_that_are_listed():
    n_folders, left = set(), set()
    found = classes("Experts")
    for cls in found:
        try:
            module = built(cls)
        except (TypeError, AttributeError):  # no experts: blocks that hold some, and mixins
            continue
        three = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if three:
            n_folders.add(cls.__module__)
            if three - conversion_plan(module, None).weights.keys():
                left.add(cls.__name__)

    assert len(n_folders) >= 55  # 59 in 5.17, and more since
    assert left == OF_OTHER_FORM & {cls.__name__ for cls in found}


@pytest.mark.slow
def test_all_embeddings_of_transformers_are_int8_but_for_those_that_are_computed():
    n_classes, left = 0, set()
    for cls in classes(base="nn.Embedding"):
        n_classes += 1
        module = built(cls)
        if not conversion_plan(module, None).weights:
            left.add(cls.__name__)

    assert n_classes >= 25
    assert all("Sinusoidal" in name for name in left), left
