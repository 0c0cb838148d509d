"""Which backend runs where, and that all offer the same operators."""

import inspect

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import backend, cpu, reference


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    monkeypatch.delenv("QFT_BACKEND", raising=False)
    backend.backend_for.cache_clear()
    yield
    backend.backend_for.cache_clear()


def test_the_device_chooses():
    assert backend.backend_for(torch.device("cpu")) is cpu


def test_a_device_without_its_own_backend_runs_the_reference():
    assert backend.backend_for(torch.device("meta")) is reference


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "reference")

    assert backend.backend_for(torch.device("cpu")) is reference


def test_an_unknown_name_lists_the_choices(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "fortran")

    with pytest.raises(ValueError, match=r"one of .*reference, .*got 'fortran'"):
        backend.backend_for(torch.device("cpu"))


def test_cpu_kernels_refuse_other_devices(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "cpu")

    with pytest.raises(ValueError, match=r"Unset QFT_BACKEND.*or use QFT_BACKEND=reference"):
        backend.backend_for(torch.device("cuda"))


@pytest.mark.parametrize("package", [reference, cpu])
def test_every_backend_has_every_operator(package):
    assert set(package.__all__) == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("package", [reference, cpu])
def test_backends_take_the_operator_s_arguments(package, name):
    """Same names; a backend may take them as `*` and `**` and pass them on."""
    kinds = inspect.Parameter
    wanted = list(inspect.signature(getattr(kernels, name)).parameters)
    own = inspect.signature(getattr(package, name)).parameters.values()
    named = [p.name for p in own if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]

    if len(named) == len(own):
        assert named == wanted
    else:
        assert set(named) <= set(wanted)
