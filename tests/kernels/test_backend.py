"""Which backend runs where, and that all offer the same operators."""

import importlib.metadata
import importlib.util
import inspect

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import backend, cpu, reference

PACKAGES = [reference, cpu]
if importlib.util.find_spec("triton"):
    PACKAGES.append(importlib.import_module("qft_hf.kernels.triton"))

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    monkeypatch.delenv("QFT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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
        backend.backend_for(CUDA)


def test_triton_kernels_refuse_the_cpu(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "triton")

    with pytest.raises(ValueError, match=r"tensors on cpu; .* Unset QFT_BACKEND"):
        backend.backend_for(torch.device("cpu"))


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which everything is new enough; each test spoils one thing."""
    monkeypatch.setattr(backend, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    return monkeypatch


@pytest.mark.skipif(len(PACKAGES) < 3, reason="triton is not installed")
def test_a_gpu_runs_triton(gpu):
    assert backend.backend_for(CUDA).__name__ == "qft_hf.kernels.triton"


def test_a_missing_triton_is_refused(gpu):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    gpu.setattr(backend, "version", missing)

    with pytest.raises(RuntimeError, match=r"found none: pip install 'triton>=3\.6', or set QFT_B"):
        backend.backend_for(CUDA)


def test_an_old_triton_is_refused(gpu):
    gpu.setattr(backend, "version", lambda name: "3.5.1")

    with pytest.raises(RuntimeError, match=r"triton 3\.6 or newer, found 3\.5\.1: pip install"):
        backend.backend_for(CUDA)


def test_an_old_gpu_is_refused(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    with pytest.raises(RuntimeError, match=r"8\.0 or newer, Old Card has 7\.5.*QFT_BACKEND=refer"):
        backend.backend_for(CUDA)


def test_another_kind_of_gpu_is_refused(gpu):
    gpu.setattr(torch.version, "cuda", None)

    with pytest.raises(RuntimeError, match=r"NVIDIA GPUs only.*or set QFT_BACKEND=reference"):
        backend.backend_for(CUDA)


def test_the_reference_runs_on_a_gpu_if_asked_for(gpu):
    gpu.setattr(torch.version, "cuda", None)
    gpu.setenv("QFT_BACKEND", "reference")

    assert backend.backend_for(CUDA) is reference


@pytest.mark.parametrize("package", PACKAGES)
def test_every_backend_has_every_operator(package):
    assert set(package.__all__) == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("package", PACKAGES)
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
