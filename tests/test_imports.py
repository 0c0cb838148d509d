"""Imports point one way: a package may import only from those listed before it."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qft_hf
from qft_hf import kernels
from qft_hf.kernels.operators import Operator

PACKAGE = Path(qft_hf.__file__).parent

ORDER = ["config", "layout", "kernels", "quant", "nn", "optim", "side", "memory", "hf"]
DOCUMENTED = ["qft_hf"] + [
    f"qft_hf.{name}" for name in ORDER if (PACKAGE / name / "__init__.py").exists()
]


def modules_imported(path: Path) -> set[str]:
    """Return the absolute names of all modules that a file imports, at any place in it."""
    package = ["qft_hf", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names.add(".".join(base))
            # `from . import kernels` imports a module by its name alone.
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def parts_imported(path: Path) -> set[str]:
    """The packages of `ORDER` that a file imports."""
    names = [name.split(".") for name in modules_imported(path)]
    return {name[1] for name in names if name[0] == "qft_hf" and len(name) > 1} & set(ORDER)


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_package_has_its_place_in_the_order():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

    assert packages == set(ORDER) - {"config", "layout"}


def test_no_file_imports_from_a_later_package():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {part}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (own := own_part(path)) in ORDER
        for part in sorted(parts_imported(path))
        if ORDER.index(part) > ORDER.index(own)
    ]

    assert upward == []


def test_the_check_sees_every_form_of_import(tmp_path, monkeypatch):
    """Each form of import, in a file that stands in for `qft_hf/nn/x.py`."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    path = tmp_path / "nn" / "x.py"
    for line, part in [
        ("from ..optim import QFTLion", "optim"),
        ("from ..optim.lion import QFTLion", "optim"),
        ("from .. import optim", "optim"),
        ("import qft_hf.optim.lion", "optim"),
        ("from qft_hf.hf import trainer", "hf"),
        ("def f():\n    from qft_hf import memory", "memory"),
        ("from .modules import QFTLinear", "nn"),
    ]:
        path.write_text(line)
        assert parts_imported(path) == {part}, line


def test_only_python_m_imports_the_command():
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(name.split(".")[0] == "qft_hf_cli" for name in modules_imported(path))
    ]

    assert found == ["__main__.py"]


def test_only_hf_imports_transformers_and_its_companions():
    heavy = {"transformers", "accelerate", "datasets", "evaluate"}
    found = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if own_part(path) in ORDER and own_part(path) != "hf"
        for name in sorted(modules_imported(path))
        if name.split(".")[0] in heavy
    ]

    assert found == []


def test_triton_and_cuda_are_never_needed_to_import():
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "triton" not in path.relative_to(PACKAGE).parts
        if any(name.split(".")[0] == "triton" for name in modules_imported(path))
    ]

    assert found == []


BACKENDS = ("cpu", "triton")


def backends_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in modules_imported(path)]
    return {name[2] for name in names if name[:2] == ["qft_hf", "kernels"] and len(name) > 2} & set(
        BACKENDS
    )


def test_backends_are_imported_by_nobody_and_not_by_each_other():
    """Backends import the operators; `kernels/backend.py` imports the chosen backend by name."""
    found = [
        f"{path.relative_to(PACKAGE)} imports {backend}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for backend in sorted(backends_imported(path))
        if path.relative_to(PACKAGE).parts[:2] != ("kernels", backend)
    ]

    assert found == []


def test_the_check_of_backends_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "x.py"
    for line in (
        "from . import cpu",
        "from .cpu import quantization",
        "from .cpu.quantization import quantize",
        "from ..kernels.cpu import quantization",
        "import qft_hf.kernels.cpu.quantization",
    ):
        path.write_text(line)
        assert backends_imported(path) == {"cpu"}, line
    path.write_text("import triton\nfrom .quantization import quantize")
    assert backends_imported(path) == set()


def test_a_backend_registers_where_the_operator_of_the_same_module_is():
    """For example, `kernels/cpu/quantization.py` registers those of `kernels/quantization.py`."""
    found = []
    for path in sorted((PACKAGE / "kernels").glob("*/*.py")):
        registers = re.findall(r"^@?(\w+)\.(\w+)\.register\(\"(\w+)\"\)", path.read_text(), re.M)
        if not registers:
            continue
        assert f"from .. import {path.stem} as operators" in path.read_text(), path
        module = importlib.import_module(f"qft_hf.kernels.{path.stem}")
        for name, operator, backend in registers:
            assert (name, backend) == ("operators", path.parent.name), path
            assert isinstance(getattr(module, operator), Operator), (path, operator)
            assert operator in kernels.__all__
            found.append((backend, operator))

    assert len(found) == len(set(found))
    operators = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Operator)}
    # Operators without an implementation run other operators, so there is nothing to warn of.
    for backend in BACKENDS:
        missing = operators - {name for registered, name in found if registered == backend}
        assert {name for name in missing if not getattr(kernels, name)._composed} == set()


def test_the_lower_packages_load_without_transformers():
    """Checks their own imports: `qft_hf/__init__.py`, which may register things, is bypassed."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('qft_hf')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['qft_hf'] = package\n"
        "import qft_hf.optim, qft_hf.nn\n"
        "assert 'transformers' not in sys.modules\n"
        "assert not {'qft_hf.kernels.cpu', 'qft_hf.kernels.triton'} & set(sys.modules)\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_exists_and_has_a_docstring(name):
    module = importlib.import_module(name)

    assert module.__doc__ or name == "qft_hf"
    undocumented = [
        public
        for public in getattr(module, "__all__", [])
        if callable(value := getattr(module, public)) and not inspect.getdoc(value)
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_listed_once_in_order(name):
    listed = list(getattr(importlib.import_module(name), "__all__", []))

    assert len(listed) == len(set(listed))
