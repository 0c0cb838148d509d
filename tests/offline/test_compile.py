"""The Triton kernels compile for each supported GPU, without spills; no GPU is needed.

The tests compile what the operators launch, types and constants included; tensors have no memory.
Needs a process without Triton's interpreter, which is the ordinary test run.
"""

import importlib
import os
import re
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from qft_hf.kernels import Input, Lion, Quantized, Rounding, Roundings, Weight
from qft_hf.kernels.values import N_LIVE
from qft_hf.layout import momentum_shapes
from tests.offline.compiling import Compiled, Launch, compile_launch, launches
from tests.scripts.commands import load

(
    dequantized_product,
    embedding,
    floats,
    gradients,
    int8_product,
    layer_input,
    layer_output,
    lion,
    output_gradient,
    quantization,
    weight,
) = (
    importlib.import_module(f"qft_hf.kernels.triton.{name}")
    for name in (
        "dequantized_product",
        "embedding",
        "floats",
        "gradients",
        "int8_product",
        "layer_input",
        "layer_output",
        "lion",
        "output_gradient",
        "quantization",
        "weight",
    )
)

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
CAPABILITIES = [80, 86, 90, 120]  # code for sm_89 is that for sm_86: see the last test
if TRITON < (3, 7):
    CAPABILITIES.remove(120)  # its packed Lion step takes 161 registers instead of 128
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # of one program
ELEMENTS = 16  # of one thread

# Columns, group size, outliers: a row in one tile, a row in two passes, groups that are momentum
# groups too, finer ones, and groups that do not fit any tile of momentum groups.
LION = [
    (4096, None, 41),
    (11008, None, 111),
    (4096, 256, 0),
    (4096, 64, 41),
    (4096, 100, 41),
]
LIVE = [(False,), (True,)]  # whether numbers of a step are in memory


def in_turn(cases: list[tuple], forms: list[tuple]) -> list[tuple]:
    """Return each case for each GPU in one form, so that each case and each GPU has every form."""
    return [
        (*case, *forms[(number + place) % len(forms)], capability)
        for number, case in enumerate(cases)
        for place, capability in enumerate(CAPABILITIES)
    ]


RULE = Lion(lr=3e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)
ROUNDING = Rounding(seed=0x1234_5678_9ABC_DEF1, step=7, stream=3, first_row=64)
ROWS = 512  # compiled into no kernel: a program handles one row
FLOATS = [torch.bfloat16, torch.float32]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantized(columns: int, group_size: int | None = 256, rows: int = ROWS) -> Quantized:
    n_groups = -(-columns // (group_size or columns))
    return Quantized(tensor(rows, columns, dtype=torch.int8), tensor(rows, n_groups), group_size)


def make_weight(
    columns: int, group_size: int | None, n_outliers: int = 0, rows: int = ROWS
) -> Weight:
    matrix = quantized(columns, group_size, rows)
    values = tensor(rows, n_outliers)
    return Weight(*matrix.tensors, values, values.short(), group_size)


def make_momentum(columns: int, bits: int) -> Quantized:
    if bits == 8:
        return quantized(columns)
    codes, scales = momentum_shapes(ROWS, columns, bits)
    return Quantized(tensor(*codes, dtype=torch.uint8), tensor(*scales), 64, bits)


def only(found: list[Launch]) -> Launch:
    """Return the launch of an operator that has only one."""
    (launch,) = found
    return launch


def lion_launch(
    columns: int,
    group_size: int | None,
    n_outliers: int,
    *,
    gradient: torch.dtype = torch.int8,
    momentum_bits: int = 8,
    rounding: Rounding = ROUNDING,
    live: bool = False,
) -> Launch:
    """Return the launch of `lion_step_`, `quantize_and_lion_step_` or (0 bits) `step_weight_`."""
    stepped = make_weight(columns, group_size, n_outliers)
    memory = tensor(N_LIVE, dtype=torch.float64) if live else None
    arguments: dict[str, Any] = {"rounding": rounding._replace(live=memory)}
    if momentum_bits == 0:
        direction = tensor(ROWS, columns)
        arguments |= {"lr": RULE.lr, "weight_decay": RULE.weight_decay}
        return only(launches(weight.step_weight_, stepped, direction, **arguments))
    momentum = make_momentum(columns, momentum_bits)
    arguments["rule"] = RULE
    if gradient == torch.int8:
        return only(launches(lion.lion_step_, stepped, momentum, quantized(columns), **arguments))
    arguments |= {"factor": tensor(1), "group_size": 256}
    floats = tensor(ROWS, columns, dtype=gradient)
    return only(launches(lion.quantize_and_lion_step_, stepped, momentum, floats, **arguments))


def compile_lion(capability: int, *sizes: Any, **options: Any) -> Compiled:
    return compile_launch(lion_launch(*sizes, **options), capability)


def assert_fits_registers(compiled: Compiled) -> None:
    assert compiled.stack_bytes == 0
    assert compiled.local_bytes == 0
    assert compiled.count("LDL|STL") == 0
    assert compiled.registers <= 128


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**62], ids=["small", "int32", "int64"])
@pytest.mark.parametrize("bits", [8, 4, 0])
def test_what_counts_random_numbers_is_an_integer_of_any_value(bits, seed):
    """No value is compiled in: another step or first row is no reason to compile again."""
    types = [
        lion_launch(
            4096, None, 41, momentum_bits=bits,
            rounding=Rounding(seed=seed, step=step, stream=step, first_row=step),
        ).types
        for step in (0, 1, 16, 12345)
    ]  # fmt: skip

    assert types[0]["seed"] == ("i64" if seed >= 2**31 else "i32")
    assert [types[0][name] for name in ("step", "stream", "first_row")] == ["i32"] * 3
    assert [types[0][name] for name in ("lr", "shrink", "gradient_sign")] == ["fp32"] * 3
    assert all(other == types[0] for other in types)


def test_the_forms_of_the_lion_step_differ_in_what_they_are_handed():
    """They get codes, floats that the kernel quantizes, or a direction instead of both."""
    coded = lion_launch(4096, None, 41)
    packed = lion_launch(4096, None, 41, momentum_bits=4)
    given = lion_launch(4096, None, 41, gradient=torch.bfloat16)
    stepped = lion_launch(4096, None, 41, momentum_bits=0)

    for launch, gradient, momentum, factor, bits in (
        (coded, "*i8", "*i8", "constexpr", 8),
        (packed, "*i8", "*u8", "constexpr", 4),
        (given, "*bf16", "*i8", "*fp32", 8),
        (stepped, "*fp32", "*fp32", "constexpr", 0),  # there is no momentum: scales stand there
    ):
        assert launch.kernel is lion._lion_kernel
        assert launch.types["gradient_codes_ptr"] == gradient
        assert launch.types["momentum_codes_ptr"] == momentum
        assert launch.types["factor_ptr"] == factor
        assert launch.constants["MOMENTUM_BITS"] == bits
        assert launch.options["enable_fp_fusion"] is False


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("columns", "group_size", "n_outliers"), [LION[1], *LION[3:]], ids=str)
def test_packed_lion_step(columns, group_size, n_outliers, capability):
    compiled = compile_lion(capability, columns, group_size, n_outliers, momentum_bits=4)

    assert_fits_registers(compiled)
    # A thread loads weights and gradients by 16 bytes, and momenta, two in a byte, by 8.
    if group_size != 100:
        assert compiled.count(r"LDG.*\.128") >= 2
        assert compiled.count(r"LDG.*\.64") >= 1
        assert compiled.count(r"STG.*\.128") == 1
        assert compiled.count(r"STG.*\.64") == 1
        assert compiled.count(r"STG.*\.(U8|S8)") <= (2 if n_outliers else 0)


@pytest.mark.parametrize(
    ("columns", "group_size", "n_outliers", "live", "capability"), in_turn(LION, LIVE)
)
def test_weight_step(columns, group_size, n_outliers, live, capability):
    """Lion's kernel without momentum loads only the weight's codes and the direction."""
    compiled = compile_lion(capability, columns, group_size, n_outliers, momentum_bits=0, live=live)

    assert_fits_registers(compiled)
    if group_size != 100:
        passes = 2 if columns == 11008 else 1  # a long row needs a first pass for its range
        assert compiled.count(r"LDG.*\.128") == passes * (1 + 4)
        assert compiled.count(r"STG.*\.128") == 1
        assert compiled.count(r"STG.*\.(U8|S8)") <= (2 if n_outliers else 0)


@pytest.mark.parametrize(
    ("columns", "group_size", "n_outliers", "live", "capability"), in_turn(LION, LIVE)
)
def test_lion_step(columns, group_size, n_outliers, live, capability, request):
    if columns == 11008 and capability == 86 and not live and TRITON >= (3, 9):
        reason = "two addresses are kept on the stack, outside of loops, beside a seed of 64 bits"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    if columns == 4096 and not group_size and capability == 120 and live and TRITON >= (3, 9):
        reason = "a register is kept on the stack once, outside of loops"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    compiled = compile_lion(capability, columns, group_size, n_outliers, live=live)

    assert_fits_registers(compiled)
    assert compiled.count(r"FADD|FMUL") >= 10 * ELEMENTS  # the listing was understood
    if group_size != 100:  # a multiple of four columns only
        # A thread loads codes of weight, momentum and gradient by 16 bytes, and stores two so.
        assert compiled.count(r"LDG.*\.128") >= 3
        assert compiled.count(r"STG.*\.128") == 2
        # The other stores are scales, outliers and the zeros in their places.
        assert compiled.count(r"STG.*\.(U8|S8)") <= (2 if n_outliers else 0)
    if capability == 90:
        assert ".target sm_90" in compiled.ptx


@pytest.mark.parametrize(
    ("columns", "group_size", "n_outliers", "live", "capability"), in_turn(LION, LIVE)
)
def test_quantize_and_lion_step(columns, group_size, n_outliers, live, capability):
    # The wider dtype is used where registers are scarcest.
    gradient = torch.float32 if columns == 11008 else torch.bfloat16
    launch = lion_launch(columns, group_size, n_outliers, gradient=gradient, live=live)
    assert launch.types["live_ptr"] == ("*fp64" if live else "constexpr")
    compiled = compile_launch(launch, capability)

    assert_fits_registers(compiled)
    if group_size != 100:
        # Loads of weight and momentum, and of the floats twice: for their scales and for the step.
        assert compiled.count(r"LDG.*\.128") >= 2 + 2 * (4 if gradient == torch.float32 else 2)
        assert compiled.count(r"STG.*\.128") == 2


@pytest.mark.parametrize(
    ("dtype", "has_momentum", "is_live", "capability"),
    in_turn(list(product(FLOATS, [True, False])), LIVE),
    ids=str,
)
def test_float_steps(dtype, has_momentum, is_live, capability):
    live = torch.ones(3, N_LIVE, dtype=torch.float64) if is_live else None
    parameters, gradients = [torch.ones(3, 700, dtype=dtype)], [torch.ones(3, 700, dtype=dtype)]
    options = {"roundings": Roundings(ROUNDING.seed, steps=[1], streams=[2], live=live)}
    if has_momentum:
        momenta = [torch.ones(3, 700)]
        found = launches(
            floats.lion_step_floats_, parameters, momenta, gradients, rule=RULE, **options
        )
    else:
        options |= {"lr": 0.1, "weight_decay": 0.01}
        found = launches(floats.step_floats_, parameters, gradients, **options)
    *rows, launch = found
    assert len(rows) == is_live  # a launch for each row of the table

    compiled = compile_launch(launch, capability)

    assert_fits_registers(compile_launch(rows[0], capability) if rows else compiled)
    assert launch.constants["HAS_MOMENTUM"] == has_momentum
    assert launch.constants["STOCHASTIC"] == (dtype == torch.bfloat16)
    assert_fits_registers(compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("columns", [4096, 11008])
def test_gradient_kernels(columns, capability):
    gradient, other = quantized(columns), quantized(columns)
    x = tensor(ROWS, columns, dtype=torch.bfloat16)
    for launch in (
        only(launches(quantization.quantize, x, group_size=256)),
        only(launches(gradients.accumulate_, gradient, other)),
        only(launches(gradients.squared_norms, gradient)),
    ):
        compiled = compile_launch(launch, capability)
        assert_fits_registers(compiled)
        assert compiled.count(r"LDG.*\.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 4096), (torch.float32, 11008)])
def test_quantize_input(dtype, columns, capability):
    """A thread loads mask and values by 16 bytes; the longer row takes two passes."""
    x = tensor(ROWS, columns, dtype=dtype)
    found = launches(layer_input.quantize_input, x, n_outliers=columns // 100)

    maxima, choice, codes = (compile_launch(launch, capability) for launch in found)

    for compiled in (maxima, choice, codes):
        assert_fits_registers(compiled)
    n_bytes = layer_input.TILE_ROWS * layer_input.TILE_COLUMNS * dtype.itemsize
    n_words = n_bytes // (16 * 32 * layer_input.N_WARPS)
    assert maxima.count(r"LDG.*\.128") == maxima.count("LDG") == n_words
    loads = 1 if columns == 4096 else 3  # of a tile: the first once, all others in both passes
    of_one = 1 + (2 if dtype == torch.bfloat16 else 4)
    assert codes.count(r"LDG.*\.128") >= loads * of_one
    # Column numbers and outliers are loaded too, and outliers and the scale are stored.
    assert codes.count("LDG") <= loads * of_one + 3
    assert codes.count(r"STG.*\.128") >= codes.count("STG") - 3


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("columns", [4096, 8192])
def test_embedding_gradient(columns, capability):
    ids, gradient = tensor(9, dtype=torch.int64), tensor(9, columns, dtype=torch.bfloat16)
    arguments = quantized(columns), ids, gradient
    launch = only(launches(embedding.embedding_gradient_, *arguments, padding_idx=None))

    compiled = compile_launch(launch, capability)

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 4  # one for each token in flight
    assert compiled.count(r"STG.*\.128") >= 1


@pytest.mark.parametrize(
    ("n_each", "dtype", "capability"),
    in_turn([(None,), (1,), (32,)], [(dtype,) for dtype in FLOATS]),  # None: all are expanded
    ids=str,
)
def test_dequantize(dtype, n_each, capability):
    rows = None if n_each is None else tensor(9, dtype=torch.int64)
    expanded = make_weight(4096, 256, 41)
    launch = only(
        launches(quantization.dequantize, expanded, rows=rows, n_each=n_each or 1, dtype=dtype)
    )

    compiled = compile_launch(launch, capability)

    assert launch.constants["GATHER"] == (n_each is not None)
    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 1
    assert compiled.count(r"STG.*\.128") >= 1
    if dtype == torch.bfloat16:  # rounded to nearest, unlike in the interpreter
        assert "cvt.rn.bf16" in compiled.ptx


@pytest.mark.parametrize(
    ("columns", "group_size", "n_outliers", "dtype", "n_tokens", "capability"),
    in_turn(
        [(4096, None, 41), (11008, None, 111), (4096, 64, 41), (4096, 100, 41)],
        list(product(FLOATS, [1, 16])),
    ),
    ids=str,
)
def test_dequantized_matmul(columns, group_size, n_outliers, dtype, n_tokens, capability):
    x, bias = tensor(n_tokens, columns, dtype=dtype), tensor(ROWS, dtype=dtype)
    multiplied = make_weight(columns, group_size, n_outliers)
    launch = only(launches(dequantized_product.dequantized_matmul, x, multiplied, bias=bias))
    constants = launch.constants

    compiled = compile_launch(launch, capability)

    assert_fits_registers(compiled)
    assert compiled.count(r"(LDG|LDGSTS).*\.128") >= 2  # codes and tokens
    assert compiled.count(r"(LDS|STS)\.(U8|S8)") == 0  # codes move in words there too
    if constants["ON_MATRIX_UNITS"]:
        # Warps split the columns, and none repeats work of another: a single warp would wait for
        # most of its loads and leave half of a GPU idle.
        assert constants["PARTS"] == launch.n_warps == 4
        assert compiled.count("HMMA") == constants["TILE"] // 16 * 2
        assert compiled.count("I2F") <= constants["ROWS"] * constants["TILE"] // 32 + 1
    else:
        # Each code is converted to float in one thread only.
        codes = constants["ROWS"] * constants["TILE"] // (32 * launch.n_warps)
        assert compiled.count(r"I2F\.S(8|16)") <= codes
        # The program number is also converted, to be divided into rows and tokens.
        assert compiled.count("I2F") <= compiled.count(r"I2F\.S(8|16)") + 1


def test_multiply_and_add_are_not_fused():
    """The remaining FFMAs are divisions by Newton's method, as many as with nothing to fuse."""
    launch = lion_launch(4096, None, 0)

    plain = compile_launch(launch, 80)
    fused = compile_launch(launch, 80, enable_fp_fusion=True)

    # Direction, momentum, decrease: at least three pairs for each element.
    assert fused.count("FFMA") >= plain.count("FFMA") + 3 * ELEMENTS
    assert plain.count("FFMA") <= 3 * ELEMENTS
    assert "fma.rn.f32" not in plain.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("i", range(3))
def test_int8_matmul(i, capability, monkeypatch):
    """The product runs on integer matrix units and moves whole words, no single bytes."""
    tile = int8_product.TILES[divmod(capability, 10)][i]
    monkeypatch.setattr(int8_product, "choose_tile", lambda *_: tile)
    int8_product.product_tiles.cache_clear()
    a, b = tensor(4000, 4096, dtype=torch.int8), tensor(2048, 4096, dtype=torch.int8)
    options = {"bias": tensor(2048), "columns": None, "values": None, "dtype": torch.bfloat16}
    arguments = (a, b.t(), tensor(4000, 1), tensor(2048, 1))
    launch = only(launches(int8_product.int8_matmul, *arguments, **options))
    int8_product.product_tiles.cache_clear()

    compiled = compile_launch(launch, capability)

    assert (launch.n_warps, launch.options["num_stages"]) == (tile.n_warps, tile.n_stages)
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
@pytest.mark.parametrize("requantizes", [False, True])
def test_products_with_given_columns(requantizes, capability, monkeypatch):
    """Each is one launch; an INT8 result is rounded in the tile and stored in whole words."""
    properties = SimpleNamespace(multi_processor_count=84)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    choose_tile = int8_product.choose_tile
    monkeypatch.setattr(
        int8_product, "choose_tile",
        lambda rows, columns, _, width: choose_tile(rows, columns, torch.device("cuda"), width),
    )  # fmt: skip
    int8_product.product_tiles.cache_clear()
    a, b = tensor(4000, 4096, dtype=torch.int8), tensor(4096, 4096, dtype=torch.int8)
    given = {"columns": tensor(41, dtype=torch.int64), "values": tensor(4000, 41)}
    if requantizes:
        found = launches(
            int8_product.requantized_matmul, a, b.t(), tensor(4000, 1), **given, group_size=256
        )
    else:
        options = {"bias": None, "dtype": torch.bfloat16, **given}
        found = launches(int8_product.int8_matmul, a, b.t(), tensor(4000, 1), None, **options)
    int8_product.product_tiles.cache_clear()

    compiled = compile_launch(only(found), capability)

    # The largest tile of Hopper keeps a few addresses on the stack.
    assert compiled.stack_bytes <= (128 if capability == 90 else 0)
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert compiled.count(r"IGMMA|IMMA\.16832\.S8") >= 4
    assert compiled.count(r"(LDG|LDS|STS)\.(U8|S8)") == 0
    assert compiled.count(r"STG.*\.128") >= compiled.count("STG") - 1  # the scale


@pytest.mark.parametrize(
    ("i", "dtype", "capability"),
    in_turn([(0,), (1,), (2,)], [(dtype,) for dtype in FLOATS]),
    ids=str,
)
def test_int8_linear(i, dtype, capability, monkeypatch):
    """Float columns follow the integer loop: on matrix units in 16 bits, and never as TF32."""
    tile = int8_product.TILES[divmod(capability, 10)][i]
    monkeypatch.setattr(int8_product, "choose_tile", lambda *_: tile)
    int8_product.product_tiles.cache_clear()
    x = Input(
        tensor(4000, 4096, dtype=torch.int8), tensor(4000, 1),
        tensor(41, dtype=torch.int64), tensor(41, 4000, dtype=dtype).t(),
    )  # fmt: skip
    floats, multiplied = tensor(4000, 4096, dtype=dtype), make_weight(4096, None, 41, rows=2048)
    options = {"bias": tensor(2048), "dtype": dtype}
    launch = only(launches(layer_output.int8_linear, x, floats, multiplied, **options))
    int8_product.product_tiles.cache_clear()

    compiled = compile_launch(launch, capability)

    # The largest tiles keep some addresses on the stack, after the loop over integers.
    assert compiled.stack_bytes <= 128
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert compiled.count(r"IGMMA|IMMA\.16832\.S8") >= 4
    assert (compiled.count("HGMMA|HMMA") > 0) == (dtype == torch.bfloat16)
    assert "tf32" not in compiled.ptx
    assert compiled.count(r"LDGSTS.*\.128") > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("i", [0, 1], ids=["maxima", "round"])
def test_quantize_gradient(i, capability):
    gradient = tensor(1024, 4096, dtype=torch.bfloat16)
    arguments = (gradient, tensor(4096, 1), tensor(1024, 1))
    options = {"stochastic": True, "seed": ROUNDING.seed}
    launch = launches(output_gradient.quantize_gradient, *arguments, **options)[i]

    compiled = compile_launch(launch, capability)

    assert_fits_registers(compiled)
    assert compiled.count(r"LDG.*\.128") >= 2
    assert launch.kernel is (output_gradient._maxima_kernel, output_gradient._round_kernel)[i]
    if i == 1:
        # A thread stores codes by 16 bytes in both orders; the only other stores are scales.
        n_stores = output_gradient.TILE**2 // (16 * 32 * output_gradient.N_WARPS)
        assert compiled.count(r"STG.*\.128") == 2 * n_stores
        assert compiled.count("STG") == 2 * n_stores + 2


@pytest.mark.parametrize(
    ("capability", "shape", "tile"),
    [
        ((8, 6), (8192, 8192), int8_product.TILES[8, 6][0]),
        ((8, 6), (2048, 1024), int8_product.TILES[8, 6][1]),  # 64 large tiles, 128 of the next
        ((8, 6), (2048, 576), int8_product.TILES[8, 6][2]),
        ((9, 0), (1, 1), int8_product.TILES[9, 0][2]),
        ((10, 3), (8192, 8192), int8_product.OTHER_TILES[0]),  # not in the table
    ],
)
def test_int8_matmul_gives_every_multiprocessor_a_tile(capability, shape, tile, monkeypatch):
    device = SimpleNamespace(multi_processor_count=84)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)

    assert int8_product.choose_tile(*shape, torch.device("cuda")) == tile


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_matmul_turns_an_operand(capability):
    """A thread reads along one dimension and writes along the other, both by 16 bytes."""
    x = tensor(4096, 2048, dtype=torch.int8).t()
    launch = only(launches(int8_product.along_k, x))

    compiled = compile_launch(launch, capability)

    assert_fits_registers(compiled)
    n_words = int8_product.COPY_TILE**2 // (16 * 32 * int8_product.COPY_WARPS)
    assert compiled.count(r"LDG.*\.128") == compiled.count("LDG") == n_words
    assert compiled.count(r"STG.*\.128") == compiled.count("STG") == n_words


VOCABULARY = 300_000


def test_no_launch_over_a_large_vocabulary_has_more_programs_than_a_gpu_takes():
    """The limit is 2**31 - 1 along the first axis of a grid, and 65,535 along the others."""
    table, columns = make_weight(4096, None, 41, rows=VOCABULARY), 4096
    codes = tensor(VOCABULARY, columns, dtype=torch.int8)
    found = []
    for dtype in FLOATS:
        for n_tokens in (1, 2, 16, 4096):
            x = tensor(n_tokens, columns, dtype=dtype)
            product = only(launches(dequantized_product.dequantized_matmul, x, table, bias=None))
            rows, tokens = product.constants["ROWS"], product.constants["TOKENS"]
            assert product.grid == (-(-VOCABULARY // rows) * -(-n_tokens // tokens),)
            found.append(product)
    found += launches(quantization.dequantize, table, rows=None, n_each=1, dtype=torch.bfloat16)
    coded = quantized(columns, rows=VOCABULARY)
    x = tensor(VOCABULARY, columns, dtype=torch.bfloat16)
    found += launches(quantization.quantize, x, group_size=256)
    found += launches(gradients.accumulate_, coded, quantized(columns, rows=VOCABULARY))
    found += launches(gradients.squared_norms, coded)
    ids, of_tokens = tensor(VOCABULARY, dtype=torch.int64), x
    found += launches(embedding.embedding_gradient_, coded, ids, of_tokens, padding_idx=None)
    for shape in ((4096, VOCABULARY), (VOCABULARY, 4096)):
        factors = tensor(shape[1], 1), tensor(shape[0], 1)
        logits = tensor(*shape, dtype=torch.bfloat16)
        found += launches(
            output_gradient.quantize_gradient, logits, *factors, stochastic=True, seed=1
        )
    options = {"bias": None, "columns": None, "values": None, "dtype": torch.bfloat16}
    for a, b in (
        (tensor(4096, columns, dtype=torch.int8), codes.t()),  # y
        (tensor(4096, VOCABULARY, dtype=torch.int8)[:, : 2**17], codes[: 2**17]),  # of grad_x
        (codes, tensor(columns, 4096, dtype=torch.int8)),  # grad_w
    ):
        found += launches(int8_product.int8_matmul, a, b, None, None, **options)
    arguments = {"lr": 0.1, "weight_decay": 0.1, "rounding": ROUNDING}
    found += launches(weight.step_weight_, table, tensor(VOCABULARY, columns), **arguments)

    for launch in found:
        first, *others = launch.grid
        assert 0 < first < 2**31, launch
        assert all(0 < programs <= 65_535 for programs in others), launch
    assert max(launch.grid[0] for launch in found) >= VOCABULARY


# Instructions of a thread for each of its elements, if a row fits one tile. On an H100, a Lion step
# is as close to its limit of instructions as to that of its memory. With triton 3.7 and 3.9.
MOST_INSTRUCTIONS = {
    "lion_step_": 70.7,
    "lion_step_ 4-bit": 101.5,
    "quantize_and_lion_step_": 91,
    "adamw_step_": 206,
    "step_weight_": 47.5,
    "quantize": 18,
    "dequantize": 8.5,
    "accumulate_": 23,
    "squared_norms": 7.4,
}


@pytest.fixture(scope="module")
def calls() -> dict[str, Any]:
    return load("benchmark_kernels").operators(64, 4096, None, torch.device("cpu"), 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_an_element_takes_so_many_instructions_and_no_more(name, capability, calls):
    roofline = load("roofline")
    n_elements, _, call = calls[name]

    count = roofline.instructions(call, capability, n_elements)

    most = MOST_INSTRUCTIONS[name]
    assert 0.84 * most < count <= most  # if fewer, lower the limit in the table


def test_the_roofline_is_of_these_kernels_and_of_rows_in_one_tile(calls):
    roofline = load("roofline")
    assert list(MOST_INSTRUCTIONS) == list(roofline.KERNELS)
    long = load("benchmark_kernels").operators(4, 11008, None, torch.device("cpu"), 1)
    n_elements, _, call = long["lion_step_"]
    with pytest.raises(ValueError, match=r"takes several tiles\. Use fewer columns"):
        roofline.instructions(call, 80, n_elements)


def test_a_time_is_the_longer_of_memory_and_instructions(monkeypatch):
    """Computed by hand, for a device on which memory limits one kernel, instructions the other."""
    roofline = load("roofline")
    device = roofline.Device(80, 1e12, 100, 1e9)
    monkeypatch.setattr(roofline, "DEVICES", {"some": device})
    monkeypatch.setattr(roofline, "KERNELS", ("dequantize", "lion_step_"))
    monkeypatch.setattr(
        roofline, "instructions", lambda call, *_: 25.6 if "rule" not in call.keywords else 128.0
    )

    found = roofline.roofline(4, 600)

    assert found["dequantize"]["ns, some"] == pytest.approx(3e-3)  # 3 bytes at 1 TB/s
    assert found["dequantize"]["of bandwidth, some"] == 1.0
    assert found["lion_step_"]["ns, some"] == pytest.approx(10e-3)  # 128 of 12.8 for a ps
    assert found["lion_step_"]["of bandwidth, some"] == pytest.approx(0.5)


@pytest.mark.parametrize("columns", [4096, 11008])
def test_code_for_sm_89_is_that_for_sm_86(columns):
    step = lion_launch(columns, None, 41)
    product = only(
        launches(
            dequantized_product.dequantized_matmul,
            tensor(16, columns, dtype=torch.bfloat16),
            make_weight(columns, None, 41),
            bias=None,
        )
    )
    for launch in (step, product):
        (ada, for_ada), (ampere, for_ampere) = (
            (compiled, re.sub(r"\.(target|file).*", "", compiled.ptx.partition(".section")[0]))
            for compiled in (compile_launch(launch, 89), compile_launch(launch, 86))
        )
        assert ".target sm_89" in ada.ptx
        assert for_ada == for_ampere
        assert ada.registers == ampere.registers
        assert len(ada.opcodes) == len(ampere.opcodes)  # some have other names
