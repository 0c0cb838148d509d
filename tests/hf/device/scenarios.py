"""Runs for the CPU and the device; each returns its results by name."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

import qft_hf
from qft_hf import QFTSGD, QFTAdamW, QFTConfig, QFTLion, QFTTrainer, QFTTrainingArguments, QSTConfig
from tests.hf.device.absent import CPU, held, waits
from tests.models import VOCAB_SIZE, tiny_llama

Run = Callable[[torch.device], dict[str, Any]]
RUNS: dict[str, Run] = {}

# GELU and eager attention: for attention and the backward pass of SiLU, PyTorch has other operators
# on a CPU than on a device in Python.
PLAIN = {"hidden_act": "gelu", "attn_implementation": "eager"}
N_STEPS = 3


def llama(**overrides: Any) -> nn.Module:
    return tiny_llama(**{**PLAIN, **overrides}).train()


def int8_llama() -> nn.Module:
    return qft_hf.quantize_model_(llama(), QFTConfig())


def of_config(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.train()


def values(model: nn.Module) -> dict[str, Any]:
    return {name: held(tensor).clone() for name, tensor in model.state_dict().items()}


def batch(number: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(number)
    return torch.randint(VOCAB_SIZE, (2, 40), generator=draw).to(device)


def train(
    model: nn.Module, optimizer: Any, device: torch.device, *, n_parts: int = 1, max_norm: float = 0
) -> dict[str, Any]:
    """Train; also return where the host waited in the passes of the last step, and in the step."""
    losses, found = [], {}
    for number in range(N_STEPS):
        waits.clear()
        for part in range(n_parts):
            ids = batch(number * n_parts + part, device)
            is_last = part == n_parts - 1
            with nullcontext() if is_last else optimizer.accumulate():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
            losses.append(loss.detach())
        found["pass"] = [tuple(wait) for wait in waits if wait.module.startswith("qft_hf")]
        waits.clear()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        found["step"] = [tuple(wait) for wait in waits if wait.module.startswith("qft_hf")]
    return {**values(model), "losses": held(torch.stack(losses)), "waits": found}


def optimizing(
    kind: Any = QFTLion,
    *,
    config: dict[str, Any] | None = None,
    build: Callable[[], nn.Module] = llama,
    n_parts: int = 1,
    max_norm: float = 0,
    **settings: Any,
) -> Run:
    def run(device: torch.device) -> dict[str, Any]:
        model = qft_hf.quantize_model_(build(), QFTConfig(**config or {})).to(device)
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1, **settings)
        return train(model, optimizer, device, n_parts=n_parts, max_norm=max_norm)

    return run


RELEASE = {"gradient": "release"}
INT8 = {"matmul": "int8"}
PREVIOUS = RELEASE | {"clipping": "previous", "max_grad_norm": 0.5}
OWN_NORM = RELEASE | {"clipping": "tensor", "max_grad_norm": 0.5}
for _name, _kind in {"lion": QFTLion, "adamw": QFTAdamW, "sgd": QFTSGD}.items():
    RUNS |= {
        f"{_name}, stack": optimizing(_kind, max_norm=0.5),
        f"{_name}, release": optimizing(_kind, **PREVIOUS),
        f"{_name}, release, own norms": optimizing(_kind, **OWN_NORM),
        f"{_name}, release of two micro-batches": optimizing(_kind, n_parts=2, **RELEASE),
    }
RUNS |= {
    "4-bit momentum": optimizing(momentum_bits=4),
    "INT8 products, stack": optimizing(config=INT8),
    "INT8 products, release": optimizing(config=INT8, **RELEASE),
    "bf16, release": optimizing(build=lambda: llama(dtype=torch.bfloat16), **RELEASE),
    "group scales": optimizing(config={"group_size": 32}),
}


def _moe(kind: Any, **sizes: Any) -> Callable[[], nn.Module]:
    shape = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 80, "hidden_act": "gelu",
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24,
    }  # fmt: skip
    return lambda: of_config(kind(**shape, **sizes))


def _gpt2() -> nn.Module:
    return of_config(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=44, n_layer=2, n_head=2, activation_function="gelu",
            attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        )
    )  # fmt: skip


RUNS |= {
    "Qwen3-MoE": optimizing(
        build=_moe(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
    ),
    "Mixtral, release": optimizing(build=_moe(MixtralConfig, num_local_experts=4), **RELEASE),
    "Gemma 2": optimizing(build=_moe(Gemma2Config)),
    "GPT-2": optimizing(build=_gpt2),
}


def scenario(function: Run) -> Run:
    RUNS[function.__name__.replace("_", " ")] = function
    return function


@scenario
def generation(device: torch.device) -> dict[str, Any]:
    ids = batch(0, device)[:, :10]
    found = {}
    for name, config in {"dequantized": {}, "int8": INT8}.items():
        model = qft_hf.quantize_model_(llama(), QFTConfig(**config)).to(device).eval()
        found[name] = held(
            model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ).tolist()
    return found


@scenario
def saved_loaded_and_dequantized(device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        int8_llama().to(device).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    loaded = values(model)
    return loaded | {f"float {k}": v for k, v in values(qft_hf.dequantize_model_(model)).items()}


@scenario
def quantized_while_loading(device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": device}, quantization_config=QFTConfig()
        )
    return values(model)


@scenario
def resized(device: torch.device) -> dict[str, Any]:
    model = int8_llama().to(device)
    model.resize_token_embeddings(VOCAB_SIZE - 5)
    return values(model)


@scenario
def adapters_on_int8(device: torch.device) -> dict[str, Any]:
    torch.manual_seed(1)
    model = get_peft_model(
        int8_llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    ).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    return train(model, torch.optim.AdamW(trained, lr=1e-3, foreach=False), device)


@contextmanager
def runs_on(device: torch.device) -> Iterator[None]:
    """Make the Trainer and Accelerate choose this device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    theirs: Any = TrainingArguments.device

    def chosen(args: TrainingArguments) -> torch.device:
        theirs.fget(args)
        return device

    with (
        mock.patch.object(TrainingArguments, "device", property(chosen)),
        mock.patch.object(PartialState, "default_device", property(lambda state: device)),
        mock.patch.object(
            PartialState, "set_device", lambda state: setattr(state, "device", device)
        ),
    ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


DATA = [{"input_ids": ids, "labels": ids} for n in range(12) for ids in batch(n, CPU)]


def with_side_network() -> nn.Module:
    torch.manual_seed(2)
    return qft_hf.attach_side_network(int8_llama(), QSTConfig(r=4))


def training(
    trainer_class: Any = QFTTrainer,
    build: Callable[[], nn.Module] = int8_llama,
    **options: Any,
) -> Run:
    """Train four steps, and the last two again, resumed from a checkpoint."""

    def run(device: torch.device) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, runs_on(device):
            kind = QFTTrainingArguments if trainer_class is QFTTrainer else TrainingArguments
            arguments = kind(
                **{
                    "output_dir": folder, "optim": "qft_lion", "learning_rate": 1e-3,
                    "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
                    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
                    "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
                    **options,
                }
            )  # fmt: skip

            def trainer() -> Any:
                return trainer_class(build(), arguments, train_dataset=DATA, eval_dataset=DATA[:4])

            made, again = trainer(), trainer()
            made.train()
            again.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
            logs = [
                {k: v for k, v in log.items() if "per_second" not in k and "runtime" not in k}
                for log in made.state.log_history
            ]
            for log in logs:
                log.pop("qft/peak_memory_gb", None)
            assert next(made.model.parameters()).device == device
            resumed = {f"resumed {name}": value for name, value in values(again.model).items()}
            return {**values(made.model), **resumed, "logs": logs}

    return run


CHECKPOINTING = {"gradient_checkpointing": True}
RUNS |= {
    "trainer, stack": training(),
    "trainer, release": training(gradient="release", clipping="previous", **CHECKPOINTING),
    "trainer, exact": training(gradient="release", clipping="exact"),
    "trainer, chunked loss": training(chunked_loss=True, gradient_accumulation_steps=2),
    "trainer, AdamW": training(optim="qft_adamw"),
    "trainer, side network": training(build=with_side_network),
    "stock Trainer": training(Trainer),
}
