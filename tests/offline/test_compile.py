"""The Triton kernels compile for each supported GPU, without spills; no GPU is needed.

Needs a process in which Triton does not interpret: the ordinary test run.
"""

import importlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from qft_hf.kernels.triton.tiling import tiling
from tests.offline.compiling import Compiled, compile_kernel

(
    dequantized_matmul,
    embedding,
    gradient,
    int8_matmul,
    lion,
    lion_float,
    quantize,
    quantize_gradient,
) = (
    importlib.import_module(f"qft_hf.kernels.triton.{name}")
    for name in (
        "dequantized_matmul",
        "embedding",
        "gradient",
        "int8_matmul",
        "lion",
        "lion_float",
        "quantize",
        "quantize_gradient",
    )
)

CAPABILITIES = [80, 86, 89, 90]
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # of one program
ELEMENTS = 16  # of one thread

# Columns, group size, outliers: a row in one tile, a row in two passes, groups that are momentum
# groups too, finer ones, and groups that no tile of momentum groups fits.
LION = [
    (4096, None, 41),
    (11008, None, 111),
    (4096, 256, 0),
    (4096, 64, 41),
    (4096, 100, 41),
]


def types_of(kernel: Any, **given: str) -> dict[str, str]:
    """Types by the naming of arguments; constexpr ones are written in capitals."""
    types = {}
    for name in kernel.arg_names:
        if name in given:
            types[name] = given[name]
        elif name.endswith("codes_ptr"):
            types[name] = "*i8"
        elif name == "outlier_columns_ptr":
            types[name] = "*i16"
        elif name in ("sorted_ptr", "order_ptr", "rows_ptr"):
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        elif name in ("seed", "n"):
            types[name] = "i64"
        elif name in ("step", "stream", "n_rows", "padding_idx"):
            types[name] = "i32"
        elif name.islower():
            types[name] = "fp32"
    return types


def compile_lion(
    capability: int,
    columns: int,
    group_size: int | None,
    n_outliers: int,
    *,
    gradient: str = "*i8",
    momentum_bits: int = 8,
    **options: Any,
) -> Compiled:
    constants, n_warps = lion.lion_constants(
        columns, n_outliers, group_size, 256, momentum_bits=momentum_bits
    )
    if gradient == "*i8":  # as it is launched then
        constants["factor_ptr"] = None
    return compile_kernel(
        lion._lion_kernel,
        types=types_of(lion._lion_kernel, gradient_codes_ptr=gradient, sums_ptr="*fp64"),
        constants={"STOCHASTIC": True, **constants},
        capability=capability,
        n_warps=n_warps,
        **options,
    )


def compile_rows(kernel: Any, capability: int, columns: int, **options: Any) -> Compiled:
    """A kernel on rows in momentum groups; `options` are further types, which are strings, and
    constants, of which a pointer that is None is one.
    """
    tiles = tiling(columns, 256)
    given = {name: type for name, type in options.items() if isinstance(type, str)}
    constants = {name: value for name, value in options.items() if name not in given}
    types = types_of(kernel, **given)
    return compile_kernel(
        kernel,
        types={name: type for name, type in types.items() if name not in constants},
        constants={**tiles.constants(), **constants},
        capability=capability,
        n_warps=tiles.n_warps,
    )


def assert_fits_registers(compiled: Compiled) -> None:
    assert compiled.stack_bytes == 0
    assert compiled.local_bytes == 0
    assert compiled.count("LDL|STL") == 0
    assert compiled.registers <= 128


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("columns", "group_size", "n_outliers"), [LION[1], *LION[3:]], ids=str)
def test_packed_lion_step(columns, group_size, n_outliers, capability):
    compiled = compile_lion(capability, columns, group_size, n_outliers, momentum_bits=4)

    assert_fits_registers(compiled)
    # Weights and gradients come in 16 bytes a thread, and momenta, two in a byte, in 8.
    if group_size != 100:
        assert compiled.count(r"LDG.*\.128") >= 2
        assert compiled.count(r"LDG.*\.64") >= 1
        assert compiled.count(r"STG.*\.128") == 1
        assert compiled.count(r"STG.*\.64") == 1
        assert compiled.count(r"STG.*\.(U8|S8)") <= (2 if n_outliers else 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sgd_step(capability):
    """The kernel of Lion without momentum: codes of weight and gradient are all that moves."""
    compiled = compile_lion(capability, 4096, None, 41, momentum_bits=0)

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") == 2
    assert compiled.count(r"STG.*\.128") == 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("columns", "group_size", "n_outliers"), LION, ids=str)
def test_lion_step(columns, group_size, n_outliers, capability):
    compiled = compile_lion(capability, columns, group_size, n_outliers)

    assert_fits_registers(compiled)
    assert compiled.count(r"FADD|FMUL") >= 10 * ELEMENTS  # the listing was understood
    if group_size != 100:  # a multiple of four columns only
        # Codes of weight, momentum and gradient come in 16 bytes a thread; two of them go so too.
        assert compiled.count(r"LDG.*\.128") >= 3
        assert compiled.count(r"STG.*\.128") == 2
        # Else only scales, outliers and the zeros under them.
        assert compiled.count(r"STG.*\.(U8|S8)") <= (2 if n_outliers else 0)
    if capability == 90:
        assert ".target sm_90" in compiled.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("columns", "group_size", "n_outliers"), LION, ids=str)
def test_quantize_and_lion_step(columns, group_size, n_outliers, capability):
    gradient = "*fp32" if columns == 11008 else "*bf16"  # the wider where registers are scarcest
    compiled = compile_lion(capability, columns, group_size, n_outliers, gradient=gradient)

    assert_fits_registers(compiled)
    if group_size != 100:
        # Weight and momentum, and the floats twice: for their scales, and to step.
        assert compiled.count(r"LDG.*\.128") >= 2 + 2 * (4 if gradient == "*fp32" else 2)
        assert compiled.count(r"STG.*\.128") == 2


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("has_momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float_steps(dtype, has_momentum, capability):
    kernel = lion_float._lion_floats_kernel
    compiled = compile_kernel(
        kernel,
        types=types_of(kernel, table_ptr="*i64", owners_ptr="*i64"),
        constants={
            "PARAMETER": lion_float.TRITON_DTYPES[dtype],
            "GRADIENT": lion_float.TRITON_DTYPES[dtype],
            "HAS_MOMENTUM": has_momentum,
            "STOCHASTIC": dtype == torch.bfloat16,
            "BLOCK": lion_float.BLOCK,
        },
        capability=capability,
        n_warps=lion_float.N_WARPS,
    )

    assert_fits_registers(compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("columns", [4096, 11008])
def test_gradient_kernels(columns, capability):
    for compiled in (
        compile_rows(
            quantize._quantize_kernel, capability, columns, x_ptr="*bf16", zero_columns_ptr=None
        ),
        compile_rows(gradient._accumulate_kernel, capability, columns),
        compile_rows(gradient._sums_of_squares_kernel, capability, columns, sums_ptr="*fp64"),
    ):
        assert_fits_registers(compiled)
        assert compiled.count(r"LDG.*\.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "columns"), [("bf16", 4096), ("fp32", 11008)])
def test_quantize_with_columns_that_count_as_zero(dtype, columns, capability):
    """The mask comes in 16 bytes a thread, as the values do; the longer row goes in two passes."""
    tiles = tiling(columns, None)
    kernel = quantize._quantize_kernel

    compiled = compile_kernel(
        kernel,
        types=types_of(kernel, x_ptr=f"*{dtype}", zero_columns_ptr="*i1"),
        constants=tiles.constants(),
        capability=capability,
        n_warps=tiles.n_warps,
    )

    assert_fits_registers(compiled)
    loads = 1 if columns == 4096 else 3  # of a tile: the first once, all others in both passes
    of_one = 1 + (2 if dtype == "bf16" else 4)
    assert compiled.count(r"LDG.*\.128") == compiled.count("LDG") == loads * of_one
    assert compiled.count(r"STG.*\.128") == compiled.count("STG") - 1  # and the scale


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("columns", [4096, 8192])
def test_embedding_gradient(columns, capability):
    kernel = embedding._embedding_gradient_kernel
    compiled = compile_rows(kernel, capability, columns, gradient_ptr="*bf16")

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 4  # one for each token in flight
    assert compiled.count(r"STG.*\.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dequantize(dtype, gather, capability):
    compiled = compile_rows(
        quantize._dequantize_kernel,
        capability,
        4096,
        x_ptr=f"*{dtype}",
        GATHER=gather,
        N_OUTLIERS=41,
        OUTLIER_TILE=64,
    )

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 1
    assert compiled.count(r"STG.*\.128") >= 1
    if dtype == "bf16":  # to nearest, which the interpreter does not show
        assert "cvt.rn.bf16" in compiled.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("n_tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("columns", "group_size", "n_outliers"),
    [(4096, None, 41), (11008, None, 111), (4096, 64, 41), (4096, 100, 41)],
    ids=str,
)
def test_dequantized_matmul(columns, group_size, n_outliers, dtype, n_tokens, capability):
    constants, n_warps = dequantized_matmul.sizes(n_tokens, columns, group_size, n_outliers, dtype)
    kernel = dequantized_matmul._dequantized_matmul_kernel
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    given = dict.fromkeys(("x_ptr", "y_ptr", "bias_ptr"), pointer)

    compiled = compile_kernel(
        kernel,
        types=types_of(kernel, **given, n_tokens="i32"),
        constants=constants,
        capability=capability,
        n_warps=n_warps,
    )

    assert_fits_registers(compiled)
    assert compiled.count(r"(LDG|LDGSTS).*\.128") >= 2  # codes and tokens
    assert compiled.count(r"(LDS|STS)\.(U8|S8)") == 0  # codes move in words there too
    if constants["ON_MATRIX_UNITS"]:
        assert compiled.count("HMMA") >= constants["TILE"] // 16 * 2
    else:
        # Each code is turned into a float in one thread only.
        codes = constants["ROWS"] * constants["TILE"] // (32 * n_warps)
        assert compiled.count("I2F") <= codes


def test_multiply_and_add_are_not_fused():
    """What is left is the division by Newton's method, as many as with nothing else to fuse."""
    plain = compile_lion(80, 4096, None, 0)
    fused = compile_lion(80, 4096, None, 0, enable_fp_fusion=True)

    # Direction, momentum, decrease: three pairs for each element at least.
    assert fused.count("FFMA") >= plain.count("FFMA") + 3 * ELEMENTS
    assert plain.count("FFMA") <= 3 * ELEMENTS
    assert "fma.rn.f32" not in plain.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("i", range(3))
def test_int8_matmul(i, capability):
    """On integer matrix units, from whole words: no byte is loaded, stored or moved alone."""
    tile = int8_matmul.TILES[divmod(capability, 10)][i]
    kernel = int8_matmul._int8_matmul_kernel
    sizes = ("M", "N", "K", "a_stride", "b_stride")
    types = types_of(kernel, a_ptr="*i8", b_ptr="*i8", out_ptr="*bf16")

    compiled = compile_kernel(
        kernel,
        types=types | dict.fromkeys(sizes, "i32"),
        constants={
            "TILE_M": tile.rows,
            "TILE_N": tile.columns,
            "TILE_K": tile.summed,
            "UNROLLED": tile.unrolled,
            "GROUP": int8_matmul.GROUP,
        },
        capability=capability,
        n_warps=tile.n_warps,
        n_stages=tile.n_stages,
        aligned=sizes[1:],
    )

    assert compiled.stack_bytes == 0
    assert compiled.local_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    if capability == 90:
        assert ".target sm_90a" in compiled.ptx
        assert compiled.count("IGMMA") >= 4
    else:
        fragments = tile.rows * tile.columns * tile.summed // (16 * 8 * 32)
        assert compiled.count(r"IMMA\.16832\.S8") == fragments * tile.unrolled // tile.n_warps
    assert compiled.count(r"LDGSTS.*\.128") > 0
    assert compiled.count(r"(LDG|LDS|STS)\.(U8|S8)") == 0
    assert compiled.count("PRMT") == 0
    assert "cvt.rn.bf16" in compiled.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["_maxima_kernel", "_round_kernel"])
def test_quantize_gradient(kernel, capability):
    kernel = getattr(quantize_gradient, kernel)
    sizes = ("N", "R")
    types = types_of(kernel, gradient_ptr="*bf16", row_bits_ptr="*i32", column_bits_ptr="*i32")

    compiled = compile_kernel(
        kernel,
        types=types | dict.fromkeys(sizes, "i32"),
        constants={"TILE": quantize_gradient.TILE}
        | ({"STOCHASTIC": True} if "STOCHASTIC" in kernel.arg_names else {}),
        capability=capability,
        n_warps=quantize_gradient.N_WARPS,
        aligned=sizes,
    )

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 2
    if kernel is quantize_gradient._round_kernel:
        # Codes leave in 16 bytes a thread in both orders; only scales are stored otherwise.
        n_stores = quantize_gradient.TILE**2 // (16 * 32 * quantize_gradient.N_WARPS)
        assert compiled.count(r"STG.*\.128") == 2 * n_stores
        assert compiled.count("STG") == 2 * n_stores + 2


@pytest.mark.parametrize(
    ("capability", "shape", "tile"),
    [
        ((8, 6), (8192, 8192), int8_matmul.TILES[8, 6][0]),
        ((8, 6), (2048, 1024), int8_matmul.TILES[8, 6][1]),  # 64 large tiles, 128 of the next
        ((8, 6), (2048, 576), int8_matmul.TILES[8, 6][2]),
        ((9, 0), (1, 1), int8_matmul.TILES[9, 0][2]),
        ((12, 0), (8192, 8192), int8_matmul.OTHER_TILES[0]),  # not in the table
    ],
)
def test_int8_matmul_gives_every_multiprocessor_a_tile(capability, shape, tile, monkeypatch):
    device = SimpleNamespace(multi_processor_count=84)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)

    assert int8_matmul.choose_tile(*shape, torch.device("cuda")) == tile


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_matmul_turns_an_operand(capability):
    """Read along one side and written along the other, both in 16 bytes a thread."""
    sizes = ("n_columns", "n_rows", "out_columns", "column_stride")

    compiled = compile_kernel(
        int8_matmul._copy_kernel,
        types={"x_ptr": "*i8", "out_ptr": "*i8"} | dict.fromkeys(sizes, "i32"),
        constants={"row_stride": 1, "TILE": int8_matmul.COPY_TILE},
        capability=capability,
        n_warps=int8_matmul.COPY_WARPS,
        aligned=sizes[1:],
    )

    assert_fits_registers(compiled)
    n_words = int8_matmul.COPY_TILE**2 // (16 * 32 * int8_matmul.COPY_WARPS)
    assert compiled.count(r"LDG.*\.128") == compiled.count("LDG") == n_words
    assert compiled.count(r"STG.*\.128") == compiled.count("STG") == n_words
