"""Peak memory of each phase and tokens per second of full training steps, beside the prediction.

The model is built from its configuration with random INT8 weights, made in INT8 on the device: it
never exists in float. Each step is forward, backward with gradient checkpointing, clipping and the
optimizer. The first step makes the optimizer's state and compiles, so the last one is reported.
On a GPU the figures are `torch.cuda.max_memory_allocated`; on a CPU, where this serves as a test of
itself at `--config tiny`, they are resident memory and say little.

Gradients wait for the step in one run and are released during backward in another; released ones
are not clipped, which would take a second backward pass. The INT8 model has a chunked loss, so that
logits do not set the peak; `--full-logits` leaves it off. The bf16 AdamW beside it is plain
transformers.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qft_hf import QFTConfig, QFTLion, QFTWeight, chunk_loss_, estimate_memory, memory_ledger
from qft_hf.config import MATMULS
from qft_hf.nn.convert import prepare_modules_

ARCHITECTURES = Path(__file__).resolve().parent.parent / "configs" / "architectures"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2-7b": json.loads((ARCHITECTURES / "llama-2-7b" / "config.json").read_text()),
    "llama-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    },
}
WEIGHT_STD = 0.02


def config_of(name: str, layers: int | None) -> LlamaConfig:
    """The configuration, cut to `layers` if given."""
    config = LlamaConfig(**CONFIGS[name] | {"tie_word_embeddings": False, "dtype": torch.bfloat16})
    if layers:
        config.num_hidden_layers = layers
    return config


def random_weight(rows: int, columns: int, spec: QFTConfig, device: torch.device) -> QFTWeight:
    """Uniform codes, scales that give the usual deviation, critical values three times that."""
    weight = QFTWeight.empty(rows, columns, spec, dtype=torch.bfloat16, device=device)
    weight.codes.random_(-127, 128)
    weight.scales.fill_(WEIGHT_STD * 3**0.5 / 127)
    n_outliers = weight.outlier_values.shape[1]
    weight.outlier_values.normal_(std=3 * WEIGHT_STD)
    places = torch.linspace(0, columns - 1, n_outliers, device=device).long()
    weight.outlier_columns.copy_(places.expand(rows, -1))
    weight.codes.scatter_(1, places.expand(rows, -1), 0)
    return weight


def build(config: LlamaConfig, device: torch.device, spec: QFTConfig | None) -> LlamaForCausalLM:
    """The model on `device`, with INT8 weights as `spec` has them, or bf16; ready to train."""
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
    with torch.device(device):  # its tables are computed, not loaded
        model.model.rotary_emb = type(rotary)(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def reset_peak(device: torch.device) -> None:
    """Start a new phase."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most that was in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train_steps(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    sequence_length: int,
    n_steps: int,
) -> dict[str, Any]:
    """Peaks by phase and time of the last of `n_steps` steps on random tokens."""
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
        if any(parameter.grad is not None for parameter in model.parameters()):  # none is released
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
    gradient: str | None,
    spec: QFTConfig | None,
    *,
    device: torch.device,
    lengths: list[int],
    n_steps: int,
    chunked_loss: bool,
) -> dict[str, Any]:
    """Build one model and train it at each sequence length.

    Args:
        config: Of the model.
        gradient: `"stack"` or `"release"` for INT8; None for bf16 AdamW.
        spec: Of INT8 weights; None for bf16.
        device: Where it trains.
        lengths: Tokens of one step.
        n_steps: Steps at each length.
        chunked_loss: Of the INT8 model.
    """
    gc.collect()  # an optimizer and its hooks refer to each other
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
    if gradient is None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    else:
        optimizer = QFTLion(parameters, lr=1e-5, weight_decay=0.1, gradient=gradient)
        if chunked_loss:
            chunk_loss_(model)
    for length in lengths:
        row = train_steps(model, optimizer, device=device, sequence_length=length, n_steps=n_steps)
        row["peak_bytes"]["all"] = max(row["peak_bytes"].values())
        if gradient is not None:
            row["predicted_bytes"] = estimate_memory(
                config,
                config=spec,
                gradient=gradient,
                sequence_length=length,
                chunked_loss=chunked_loss,
            ).total_bytes
        figures["sequence_lengths"][str(length)] = row
    return figures


def layers_that_fit(config: LlamaConfig, device: torch.device) -> int:
    """Layers of a bf16 AdamW model, 8 bytes per parameter, in 80 % of the device."""
    if device.type != "cuda":
        return config.num_hidden_layers
    head = config.num_attention_heads
    key_value = config.hidden_size * config.num_key_value_heads // head
    layer = 2 * config.hidden_size * (config.hidden_size + key_value)
    layer += 3 * config.hidden_size * config.intermediate_size
    tables = 2 * config.vocab_size * config.hidden_size
    budget = 0.8 * torch.cuda.get_device_properties(device).total_memory / 8 - tables
    return max(1, min(config.num_hidden_layers, int(budget // layer)))


def print_rows(name: str, figures: dict[str, Any]) -> None:
    """One line for each sequence length."""
    for length, row in figures["sequence_lengths"].items():
        peaks = row["peak_bytes"]
        predicted = row.get("predicted_bytes")
        shown = f"{predicted / 1e9:>11.2f}" if predicted else f"{'-':>11}"
        print(
            f"{name:<20}{figures['layers']:>7}{length:>8}{figures['load_peak_bytes'] / 1e9:>8.2f}"
            f"{peaks['forward'] / 1e9:>9.2f}{peaks['backward'] / 1e9:>10.2f}"
            f"{peaks['step'] / 1e9:>7.2f}{row['ledger_bytes'] / 1e9:>8.2f}{shown}"
            f"{row['tokens_per_second']:>10.0f}",
            flush=True,
        )


def main() -> None:
    """Profile INT8, and bf16 AdamW if asked; print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=sorted(CONFIGS), default="llama2-7b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=3, help="the last one counts (default 3)")
    parser.add_argument(
        "--gradient", choices=("stack", "release"), nargs="+", default=["stack", "release"]
    )
    parser.add_argument("--matmul", choices=MATMULS, nargs="+", default=["dequantize"])
    parser.add_argument("--full-logits", action="store_true", help="no chunked loss")
    parser.add_argument(
        "--compare", action="store_true", help="also bf16 AdamW, both at the layers that fit it"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    arguments = {
        "device": device,
        "lengths": options.sequence_lengths,
        "n_steps": options.steps,
        "chunked_loss": not options.full_logits,
    }

    print(
        f"{'GB':<20}{'layers':>7}{'tokens':>8}{'load':>8}{'forward':>9}{'backward':>10}{'step':>7}"
        f"{'ledger':>8}{'predicted':>11}{'tokens/s':>10}"
    )
    config = config_of(options.config, options.layers)
    runs: dict[str, Any] = {}

    def run(name: str, config: LlamaConfig, gradient: str | None, matmul: str = "") -> None:
        name += ", int8" if matmul == "int8" else ""
        spec = QFTConfig(matmul=matmul) if matmul else None
        runs[name] = profile(config, gradient, spec, **arguments)
        print_rows(name, runs[name])

    for matmul in options.matmul:
        for gradient in options.gradient:
            run(f"QFT {gradient}", config, gradient, matmul)
    if options.compare:
        smaller = config_of(options.config, layers_that_fit(config, device))
        run("AdamW bf16", smaller, None)
        if smaller.num_hidden_layers != config.num_hidden_layers:
            for matmul in options.matmul:
                run("QFT same size", smaller, "stack", matmul)
    if options.json:
        figures = {"config": options.config, "runs": runs}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
