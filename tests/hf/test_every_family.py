"""Every class of transformers that holds experts in one parameter, or derives from nn.Embedding.

Each is built alone, with toy sizes and without storage: conversion recognizes a module by its
parameters and its forward.
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
# Inkling's two shared experts, used by every token next to 256 others, are 0.8 % of all experts.
# Aria's have the usual form in newer transformers; in 5.17 they stay float, with a warning.
OF_OTHER_FORM = {"InklingSharedExperts", "AriaGroupedExpertsGemm"}


def size(name: str) -> float:
    """Return the toy size of an argument; 0 for probabilities and for token numbers."""
    return 0 if "drop" in name or "pad" in name else 8


class Sizes:
    """A configuration that has every attribute."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return "silu" if "act" in name else size(name)


def classes(*names: str, base: str = "") -> list[type[nn.Module]]:
    """Return the classes of all models with one of `names` in their name or with base `base`."""
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
    """Build a module with toy sizes on the meta device."""
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
        except (TypeError, AttributeError):  # blocks that contain experts, and mixins
            continue
        three = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if three:
            n_folders.add(cls.__module__)
            if three - conversion_plan(module, None).weights.keys():
                left.add(cls.__name__)

    assert len(n_folders) >= 55  # 59 in transformers 5.17, and more since
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
