"""Peak memory per phase and tokens per second of full training steps, with predicted memory.

The model is built from its configuration with random INT8 weights that are generated on the device:
it never exists in float. Each step is forward, backward with gradient checkpointing, clipping and
the optimizer. The first step creates the optimizer's state and compiles, so the last one is
reported. On a GPU the figures are `torch.cuda.max_memory_allocated`; on a CPU they are resident
memory and say little: a run there with `--config tiny` only tests the script.

One run has `gradient="stack"`, another `"release"`. Released gradients are not clipped, because
exact clipping takes a second backward pass. The INT8 model has a chunked loss, so that logits do
not set the peak; `--full_logits` turns it off. With `--compare`, plain transformers are trained in
bf16 by AdamW, and by FlashOptim's optimizers if they are installed.
"""

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line, default_device
from common.peak_memory import peak_bytes, reset_peak
from common.peers import MakeOptimizer, flash_peers
from common.shapes import model_config

from qft_hf import QFTConfig, QFTLion, QFTWeight, chunk_loss_, estimate_memory, memory_ledger
from qft_hf.nn.convert import prepare_modules_
from qft_hf.quant import Arrangement

PHASES = ("forward", "backward", "step")
WEIGHT_STD = 0.02


def config_of(name: str, layers: int | None) -> LlamaConfig:
    """Return the configuration of a bf16 model whose head is not tied to its embedding."""
    config = model_config(name, layers)
    config.tie_word_embeddings, config.dtype = False, torch.bfloat16
    return config


def random_weight(rows: int, columns: int, spec: QFTConfig, device: torch.device) -> QFTWeight:
    """Return uniform codes of deviation `WEIGHT_STD`, and normal outliers of three times that."""
    weight = QFTWeight.empty(
        Arrangement((rows, columns)), spec, dtype=torch.bfloat16, device=device
    )
    weight.codes.random_(-127, 128)
    weight.scales.fill_(WEIGHT_STD * 3**0.5 / 127)
    n_outliers = weight.outlier_values.shape[1]
    weight.outlier_values.normal_(std=3 * WEIGHT_STD)
    places = torch.linspace(0, columns - 1, n_outliers, device=device).long()
    weight.outlier_columns.copy_(places.expand(rows, -1))
    weight.codes.scatter_(1, places.expand(rows, -1), 0)
    return weight


def build(config: LlamaConfig, device: torch.device, spec: QFTConfig | None) -> LlamaForCausalLM:
    """Return the model on `device`, ready to train, with INT8 weights by `spec`, or bf16 ones."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if spec is not None:
        for module in prepare_modules_(model, spec).modules.values():
            weight = random_weight(*module.weight.shape, spec, device)
            module.weight = nn.Parameter(weight)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1.0) if value.ndim < 2 else value.normal_(std=WEIGHT_STD)
                setattr(module, name, nn.Parameter(value))
    rotary = model.model.rotary_emb
    with torch.device(device):  # its buffers are computed, so they cannot stay on meta
        model.model.rotary_emb = type(rotary)(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train_steps(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    sequence_length: int,
    n_steps: int,
) -> dict[str, Any]:
    """Return peaks by phase and the time of the last of `n_steps` steps on random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, sequence_length), device=device)
    for _ in range(n_steps):
        peaks, begin = {}, time.perf_counter()
        reset_peak(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        peaks["forward"] = peak_bytes(device)
        reset_peak(device)
        loss.backward()
        peaks["backward"] = peak_bytes(device)
        ledger = memory_ledger(model, optimizer)
        reset_peak(device)
        if any(parameter.grad is not None for parameter in model.parameters()):  # not released
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peaks["step"] = peak_bytes(device)
        seconds = time.perf_counter() - begin
    return {
        "loss": float(loss.detach()),
        "peak_bytes": peaks,
        "ledger_bytes": ledger.total_bytes,
        "seconds_per_step": seconds,
        "tokens_per_second": sequence_length / seconds,
    }


def profile(
    config: LlamaConfig,
    training: str | MakeOptimizer,
    spec: QFTConfig | None,
    *,
    device: torch.device,
    lengths: list[int],
    n_steps: int,
    chunked_loss: bool,
) -> dict[str, Any]:
    """Build one model and train it at each sequence length.

    Args:
        config: Configuration of the model.
        training: `"stack"` or `"release"` for INT8; makes the optimizer of a bf16 model.
        spec: Configuration of INT8 weights; None for bf16.
        device: Device of the model.
        lengths: Sequence lengths; each step has one sequence.
        n_steps: Steps at each length.
        chunked_loss: Whether the INT8 model computes its loss in chunks.
    """
    gc.collect()  # the previous optimizer and its hooks are in a reference cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    model = build(config, device, spec)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    figures: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "n_parameters": n_parameters,
        "load_peak_bytes": peak_bytes(device),
        "sequence_lengths": {},
    }
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if isinstance(training, str):
        optimizer = QFTLion(parameters, lr=1e-5, weight_decay=0.1, gradient=training)
        if chunked_loss:
            chunk_loss_(model)
    else:
        optimizer = training(parameters)
    for length in lengths:
        row = train_steps(model, optimizer, device=device, sequence_length=length, n_steps=n_steps)
        row["peak_bytes"]["all"] = max(row["peak_bytes"].values())
        if isinstance(training, str):
            row["predicted_bytes"] = estimate_memory(
                config,
                config=spec,
                gradient=training,
                sequence_length=length,
                chunked_loss=chunked_loss,
            ).total_bytes
        figures["sequence_lengths"][str(length)] = row
    return figures


def layers_that_fit(config: LlamaConfig, device: torch.device) -> int:
    """Return how many layers fit in 80 % of the device with bf16 AdamW, 8 bytes per parameter."""
    if device.type != "cuda":
        return config.num_hidden_layers
    head = config.num_attention_heads
    key_value = config.hidden_size * config.num_key_value_heads // head
    layer = 2 * config.hidden_size * (config.hidden_size + key_value)
    layer += 3 * config.hidden_size * config.intermediate_size
    tables = 2 * config.vocab_size * config.hidden_size
    budget = 0.8 * torch.cuda.get_device_properties(device).total_memory / 8 - tables
    return max(1, min(config.num_hidden_layers, int(budget // layer)))


def table(runs: dict[str, Any]) -> str:
    """Return a table of peaks in GB by phase and speed, a row for each run and length."""
    rows = []
    for name, figures in runs.items():
        for length, row in figures["sequence_lengths"].items():
            peaks = [row["peak_bytes"][phase] for phase in PHASES]
            n_bytes = [figures["load_peak_bytes"], *peaks, row["ledger_bytes"]]
            shown = [report.number(n / 1e9, 2) for n in n_bytes]
            predicted = row.get("predicted_bytes")
            shown.append(predicted and report.number(predicted / 1e9, 2))
            speed = report.number(row["tokens_per_second"], 0)
            rows.append([name, figures["layers"], length, *shown, speed])
    head = ["training", "layers", "tokens", "load", *PHASES, "ledger", "predicted", "tokens/s"]
    return f"Batch 1, gradient checkpointing; GB (1e9).\n\n{report.table(head, rows)}"


def main() -> None:
    """Profile INT8, and with `--compare` bf16 AdamW; write the report after each run."""
    parser = command_line(
        __doc__, device=default_device(), config="llama-2-7b", layers=None,
        sequence_length=[512, 2048], steps=3, matmul=["dequantize"],
    )  # fmt: skip
    parser.add_argument(
        "--gradient", choices=("stack", "release"), nargs="+", default=["stack", "release"]
    )
    parser.add_argument("--full_logits", action="store_true", help="do not chunk the loss")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also bf16 AdamW, FlashOptim and QFT, with as many layers as fit bf16 AdamW",
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    arguments = {
        "device": device,
        "lengths": options.sequence_length,
        "n_steps": options.steps,
        "chunked_loss": not options.full_logits,
    }
    config = config_of(options.config, options.layers)
    runs: dict[str, Any] = {}

    def run(
        name: str, config: LlamaConfig, training: str | MakeOptimizer, matmul: str = ""
    ) -> None:
        name += ", int8" if matmul == "int8" else ""
        print(f"== {name}", flush=True)
        spec = QFTConfig(matmul=matmul) if matmul else None
        runs[name] = profile(config, training, spec, **arguments)
        report.write(options, {"runs": runs}, table(runs))

    for matmul in options.matmul:
        for gradient in options.gradient:
            run(f"QFT {gradient}", config, gradient, matmul)
    if options.compare:
        smaller = config_of(options.config, layers_that_fit(config, device))
        fused = device.type == "cuda"
        run("AdamW bf16", smaller, lambda p: torch.optim.AdamW(p, lr=1e-5, fused=fused))
        for name, make in flash_peers().items():
            run(name, smaller, make)
        if smaller.num_hidden_layers != config.num_hidden_layers:
            for matmul in options.matmul:
                run("QFT same size", smaller, "stack", matmul)
    report.finish(options, table(runs))


if __name__ == "__main__":
    main()
