"""The number of CPU threads changes no bit of a training run."""

import os
import subprocess
import sys

import pytest
import torch

from qft_hf import kernels
from qft_hf.config import QuantizationSpec
from qft_hf.kernels import Quantized
from qft_hf.nn import Groups, Int8Products, grouped_linear
from qft_hf.quant import QFTWeight

# 192 tokens and layers whose outlier columns' FP32 products PyTorch splits among threads.
RUNS = """
import hashlib, sys
import torch
from qft_hf.config import QuantizationSpec
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTLion
from tests.models import VOCAB_SIZE, tiny_llama
from tests.optim.common import model_tensors, state_tensors

def digest(dtype, matmul, clipping):
    model = tiny_llama(hidden_size=256, intermediate_size=576, dtype=dtype, attention_bias=True)
    quantize_modules_(model, QuantizationSpec(matmul=matmul, outlier_fraction=0.02, seed=5))
    released = {"gradient": "release", "clipping": clipping, "max_grad_norm": 0.3}
    optimizer = QFTLion(
        model.train().parameters(), lr=1e-3, seed=11, **(released if clipping else {})
    )
    found = hashlib.sha256()
    for step in range(2):
        ids = torch.randint(VOCAB_SIZE, (4, 48), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        found.update(loss.detach().float().numpy().tobytes())
    for tensors in (model_tensors(model), state_tensors(optimizer)):
        for name in sorted(tensors):
            found.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]

for n_threads in (1, 3):
    torch.set_num_threads(n_threads)
    print("threads", torch.get_num_threads())
    for dtype in (torch.float32, torch.bfloat16):
        for matmul in ("int8", "dequantize"):
            for clipping in (None, "previous"):
                print(dtype, matmul, clipping, digest(dtype, matmul, clipping))
"""


def test_runs_on_one_and_three_threads_end_in_the_same_bits():
    """In FP32, outlier columns once came from products that PyTorch splits among threads.

    Other tests ran on one thread, or compared kernels and not the code between them.
    """
    result = subprocess.run(
        [sys.executable, "-c", RUNS],
        env={**os.environ, "MKL_DYNAMIC": "FALSE"},  # MKL takes as many threads as it is told
        check=True,
        capture_output=True,
        text=True,
    )
    printed = [text.splitlines() for text in result.stdout.split("threads ")[1:]]
    counts, digests = [first for first, *_ in printed], [others for _, *others in printed]

    assert counts == ["1", "3"]
    assert len(set(digests[0])) == 8  # all runs differ
    assert digests[1] == digests[0]


@pytest.fixture
def on_threads():
    """Call a function on one, two, three and four threads, and return its results."""
    before = torch.get_num_threads()

    def call(function):
        results = []
        for n_threads in (1, 2, 3, 4):
            torch.set_num_threads(n_threads)
            results.append(function())
        return results

    yield call
    torch.set_num_threads(before)


def test_the_norm_of_a_gradient_of_many_rows_is_the_same(on_threads):
    """PyTorch splits a sum of 32,768 terms or more, here one for each row, among its threads."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (70_000, 2), generator=generator).to(torch.int8)
    gradients = [
        Quantized(codes, torch.randn(len(codes), 1, generator=generator).exp(), None)
        for _ in range(12)
    ]

    norms = on_threads(lambda: [kernels.squared_norm(gradient).item() for gradient in gradients])

    assert norms == 4 * norms[:1]


def test_int8_products_of_experts_are_the_same(on_threads):
    counts, rows, columns = [96, 0, 64, 33], 320, 256
    spec = QuantizationSpec(matmul="int8", outlier_fraction=0.02)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(len(counts), rows, columns, generator=generator)
    x = torch.randn(sum(counts), columns, generator=generator)
    grad_y = torch.randn(sum(counts), rows, generator=generator)
    groups = Groups(torch.tensor(counts).cumsum(0).tolist(), x.device)

    def products() -> list[torch.Tensor]:
        weight = torch.nn.Parameter(QFTWeight.from_float(values, spec))
        leaf = x.clone().requires_grad_()
        y = grouped_linear(leaf, weight, groups, products=Int8Products())
        y.backward(grad_y)
        return [y.detach(), leaf.grad, weight.grad.codes, weight.grad.scales]

    one, *others = on_threads(products)

    for other in others:
        assert all(map(torch.equal, other, one))
