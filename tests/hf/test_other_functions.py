"""Functions of PyTorch, transformers and Accelerate that know nothing of INT8, on INT8 models."""

import copy

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType, load_checkpoint_in_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.optim import QFTAdamW, QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.arranged import tiny
from tests.hf.checkpoints import assert_same_state
from tests.models import tiny_llama
from tests.tolerances import FP32_EPS, assert_same_tensors

IDS = torch.arange(24).view(2, 12) % 7


def int8_llama(*, seed: int = 0, **arguments):
    return quantize_model_(tiny_llama(seed=seed, **arguments), QFTConfig())


def trained(kind=QFTLion, *, seed: int = 0, steps: int = 2):
    model = int8_llama(seed=seed)
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return [
        *model.state_dict().values(),
        *(of_one[name] for _, of_one in sorted(state.items()) for name in sorted(of_one)),
    ]


# --- sizes ----------------------------------------------------------------------------------------


def test_sizes_are_what_is_stored():
    """Sizes were once those of the float weights, three to four times as large."""
    model = int8_llama()
    stored = sum(tensor.untyped_storage().nbytes() for tensor in model.state_dict().values())

    assert model.get_memory_footprint(return_buffers=False) == pytest.approx(stored)
    assert sum(parameter.nbytes for parameter in model.parameters()) == stored
    weight = model.lm_head.weight
    assert weight.nbytes == sum(field.nbytes for field in weight.fields().values())
    assert weight.element_size() * weight.numel() == pytest.approx(weight.nbytes)
    assert 1 < weight.element_size() < 1.5
    assert weight[:3].nbytes == 3 * weight.shape[1] * 4  # a view has float values


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.float16}, {"special_dtypes": {}}])
@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tied=True), lambda: tiny("qwen3_moe")]
)
def test_accelerate_counts_what_is_stored(make, arguments):
    """Accelerate fills devices by these sizes, which were once those of float weights."""
    model = quantize_model_(make(), QFTConfig(group_size=16))
    named = arguments | {
        key: dict.fromkeys(["lm_head.weight"], torch.float32)
        for key in arguments.keys() & {"special_dtypes"}
    }

    sizes = accelerate.utils.modeling.compute_module_sizes(model, **named)

    for name in ("model.layers.1", "model.embed_tokens", "model.layers.0.mlp", ""):
        parameters = dict(model.get_submodule(name).named_parameters())
        int8 = [p.nbytes for p in parameters.values() if isinstance(p, QFTWeight)]
        others = [*model.get_submodule(name).buffers(), *parameters.values()]
        n_float = sum(x.numel() for x in others if not isinstance(x, QFTWeight))
        assert sizes[name] == sum(int8) + n_float * (2 if "dtype" in arguments else 4), name
    assert sizes["model.embed_tokens.weight"] == model.model.embed_tokens.weight.nbytes
    assert accelerate.utils.compute_module_sizes(model, **named) == sizes
    fits = {0: 10 * sizes[""], "cpu": 10 * sizes[""]}
    assert accelerate.infer_auto_device_map(model, fits, **named) == {"": 0}


def test_accelerate_counts_float_models_as_ever():
    model = tiny_llama()
    compute = accelerate.utils.compute_module_sizes

    assert compute(model)["lm_head"] == 4 * model.lm_head.weight.numel()
    assert compute(int8_llama(), buffers_only=True) == compute(model, buffers_only=True)


def test_an_average_of_two_models_is_computed_in_float_and_refused_in_int8():
    """Averaged codes and column numbers once made a model of neither, without an error."""
    models = [int8_llama(seed=seed) for seed in (1, 2)]
    one, other = (model.state_dict() for model in models)
    average = {
        name: tensor.float().lerp(other[name].float(), 0.5).to(tensor.dtype)
        for name, tensor in one.items()
    }

    with pytest.raises(RuntimeError, match=r"codes other than 0 under outliers .* dequantize"):
        int8_llama().load_state_dict(average)

    floats = [dict(model.named_parameters()) for model in models]
    average = {name: (tensor + floats[1][name]) / 2 for name, tensor in floats[0].items()}
    tiny_llama().load_state_dict(average)
    wanted = [dequantize_model_(model, torch.float32).lm_head.weight for model in models]
    assert torch.equal(average["lm_head.weight"], (wanted[0] + wanted[1]) / 2)


# --- the state-dict functions of torch.distributed ------------------------------------------------


@pytest.mark.parametrize(
    "options", [None, StateDictOptions(full_state_dict=True, cpu_offload=True)]
)
def test_the_distributed_state_dict_of_a_model_is_its_own(options):
    model, other = int8_llama(seed=1), int8_llama(seed=2)

    state = get_model_state_dict(model, options=options)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, state)

    assert_same_tensors(list(other.state_dict().values()), list(model.state_dict().values()))
    assert model.lm_head.weight_q.data_ptr() == model.lm_head.weight.codes.data_ptr()
    with pytest.raises(AttributeError, match="weight_q"):
        nn.Linear(2, 2).weight_q  # noqa: B018


@pytest.mark.parametrize("kind", [QFTLion, QFTAdamW])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_distributed_checkpoint_restores_weights_state_and_step(kind, is_fresh, tmp_path):
    """The step, which counts random numbers, is restored too: the next step has the same bits."""
    model, optimizer = trained(kind)
    state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=tmp_path)

    other, its_optimizer = trained(kind, seed=5, steps=0 if is_fresh else 3)
    loaded = {
        "model": get_model_state_dict(other),
        "optimizer": get_optimizer_state_dict(other, its_optimizer),
    }
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_model_state_dict(other, loaded["model"])
    set_optimizer_state_dict(other, its_optimizer, loaded["optimizer"])

    assert_same_tensors(tensors(other, its_optimizer), tensors(model, optimizer))
    assert its_optimizer.state[other.lm_head.weight]["step"] == 2
    for one, of_one in ((model, optimizer), (other, its_optimizer)):
        one(IDS, labels=IDS).loss.backward()
        of_one.step()
    assert_same_tensors(tensors(other, its_optimizer), tensors(model, optimizer))


def test_a_distributed_checkpoint_of_the_optimizer_s_own_state_keeps_the_step(tmp_path):
    _model, optimizer = trained()
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    other, its_optimizer = trained(steps=5)

    state = {"optimizer": its_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    its_optimizer.load_state_dict(state["optimizer"])

    assert its_optimizer.state[other.lm_head.weight]["step"] == 2


# --- torch.distributed and torch.func around a model ----------------------------------------------


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.DEEPSPEED, "DeepSpeed partitions.*`accelerate launch"),
        (DistributedType.FSDP, "FSDP shards.*`accelerate launch"),
        (DistributedType.MEGATRON_LM, "Megatron-LM splits.*`accelerate launch"),
    ],
)
def test_ways_of_accelerate_to_divide_a_model_are_refused_by_name(kind, message, monkeypatch):
    """Only FSDP was: the others, and FSDP2, have a preparation of their own in Accelerate."""
    model, optimizer = trained()
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", kind)

    with pytest.raises(ValueError, match=message):
        accelerator.prepare(optimizer, model)
    with pytest.raises(ValueError, match=message):
        accelerator.prepare_model(model)


COLLECTIVES = {
    "broadcast": lambda tensor: dist.broadcast(tensor, 0),
    "all_reduce": dist.all_reduce,
    "all_reduce of a view": lambda tensor: dist.all_reduce(tensor[:2]),
    "scatter": lambda tensor: dist.scatter(tensor, [tensor]),
    "all_gather": lambda tensor: dist.all_gather([torch.empty(tensor.shape)], tensor),
}


@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES)
@pytest.mark.parametrize("of", ["weight", "gradient"])
def test_a_collective_that_would_be_lost_is_refused(of, collective, one_process):
    """Sums and broadcasts once went into temporary values, and a scatter crashed."""
    model = int8_llama()
    model(IDS, labels=IDS).loss.backward()
    weight = model.lm_head.weight

    with pytest.raises(NotImplementedError, match=r"would be lost.*init_process_group.*not use"):
        collective(weight.detach() if of == "weight" else weight.grad)
    dist.all_reduce(weight.codes)  # its fields are plain tensors


def test_a_wrapper_of_ones_own_is_refused_and_what_to_do_instead_is_said(one_process):
    with pytest.raises(NotImplementedError, match="do not use DistributedDataParallel"):
        nn.parallel.DistributedDataParallel(int8_llama())


def fully_sharded() -> None:
    model = int8_llama()
    fully_shard(model)
    model(IDS)


def differentiated_by_torch_func() -> None:
    model = int8_llama()
    torch.func.grad(
        lambda parameters: torch.func.functional_call(model, parameters, (IDS, None)).logits.sum()
    )(dict(model.named_parameters()))


@pytest.mark.parametrize("use", [fully_sharded, differentiated_by_torch_func])
def test_who_puts_float_weights_in_the_place_of_int8_ones_is_named(use, one_process):
    """The error once told a user who had called quantize_model_ to call it."""
    with pytest.raises(RuntimeError, match=r"fully_shard or torch\.func.*dequantize_model_ before"):
        use()


# --- memory of several processes ------------------------------------------------------------------


def test_shared_memory_is_seen_by_another_process():
    """`share_memory()` once caused a segmentation fault."""
    model = int8_llama().share_memory()
    weight = model.lm_head.weight
    assert weight.is_shared()
    assert not int8_llama().lm_head.weight.is_shared()

    def change() -> None:
        weight.codes.fill_(5)
        weight.scales.fill_(0.25)

    child = torch.multiprocessing.get_context("fork").Process(target=change)
    child.start()
    child.join()

    assert child.exitcode == 0
    assert (weight.codes == 5).all()
    assert (weight.scales == 0.25).all()
    with pytest.raises(NotImplementedError, match=r"no memory to share: call model\.share_mem"):
        weight[0].share_memory_()


# --- Accelerate's dispatch ------------------------------------------------------------------------


def test_a_model_dispatched_to_one_device_computes_as_before():
    model = int8_llama()
    before = model(IDS).logits

    dispatched = accelerate.dispatch_model(model, {"": "cpu"})

    assert torch.equal(dispatched(IDS).logits, before)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloading_is_refused_and_says_what_to_do(way, tmp_path):
    model = int8_llama()
    offload = {
        "cpu_offload": lambda: accelerate.cpu_offload(model, torch.device("cpu")),
        "disk_offload": lambda: accelerate.disk_offload(model, tmp_path, torch.device("cpu")),
        "dispatch_model": lambda: accelerate.dispatch_model(
            model,
            {"model": "disk", "lm_head": "cpu"},
            main_device="cpu",
            offload_dir=tmp_path,
        ),
    }[way]
    with pytest.raises(TypeError, match=r"Accelerate .*INT8 weights do not support: use from_p"):
        offload()


def test_a_checkpoint_is_loaded_into_an_int8_model_by_accelerate(tmp_path):
    model, other = int8_llama(seed=1), int8_llama(seed=2)
    model.save_pretrained(tmp_path)

    load_checkpoint_in_model(other, tmp_path)

    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("load", ["load_checkpoint_and_dispatch", "load_checkpoint_in_model"])
@pytest.mark.parametrize("shards", [None, "9KB"], ids=["one file", "shards"])
def test_accelerate_loads_no_int8_checkpoint_into_a_float_model(load, shards, tmp_path):
    """Accelerate alone only warns of unused weights, and the model keeps its random values."""
    int8_llama(seed=1).save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    index = "model.safetensors.index.json" if shards else "model.safetensors"
    for checkpoint in (tmp_path, str(tmp_path), tmp_path / index):
        model = tiny_llama(seed=2)
        with pytest.raises(ValueError, match=r"would leave this float model .* from_pretrained of"):
            getattr(accelerate, load)(model, checkpoint)
        assert_same_state(model, tiny_llama(seed=2))


def test_accelerate_dispatches_an_int8_checkpoint_without_a_device_map_only(tmp_path):
    model, other = int8_llama(seed=1), int8_llama(seed=2)
    model.save_pretrained(tmp_path)
    before = int8_llama(seed=2)

    for device_map in ("auto", {"": "cpu"}):
        with pytest.raises(ValueError, match=r"finds no parameters for them .* from_pretrained of"):
            accelerate.load_checkpoint_and_dispatch(other, tmp_path, device_map=device_map)
        assert_same_state(other, before)

    accelerate.load_checkpoint_and_dispatch(other, tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_accelerate_loads_float_checkpoints_as_ever(tmp_path):
    model = tiny_llama(seed=1)
    model.save_pretrained(tmp_path)
    for device_map in (None, {"": "cpu"}):
        other = tiny_llama(seed=2)
        accelerate.load_checkpoint_and_dispatch(other, tmp_path, device_map=device_map)
        assert_same_state(other, model)


# --- running means --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}])
def test_a_running_mean_is_kept_by_a_float_copy(arguments):
    model, optimizer = trained(steps=0)
    mean = AveragedModel(dequantize_model_(copy.deepcopy(model), torch.float32), **arguments)
    mean.update_parameters(model)
    first = dequantize_model_(copy.deepcopy(model), torch.float32).state_dict()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()

    mean.update_parameters(model)

    second = dequantize_model_(copy.deepcopy(model), torch.float32).state_dict()
    share = 0.25 if arguments else 0.5  # weight of the second of two models
    for name, value in mean.module.state_dict().items():
        expected = (1 - share) * first[name].double() + share * second[name].double()
        assert ((value - expected).abs() <= 4 * FP32_EPS * expected.abs().max()).all()
        assert not torch.equal(first[name], second[name])


def test_a_running_mean_in_an_int8_copy_is_refused_and_says_what_to_do():
    model = int8_llama()
    mean = AveragedModel(model)
    mean.update_parameters(model)  # the first update is a copy

    with pytest.raises(
        NotImplementedError, match=r"running mean.*dequantize_model_\(copy\.deepcopy\(model\)"
    ):
        mean.update_parameters(model)


# --- PyTorch's default dtype ----------------------------------------------------------------------


SETTINGS = [
    {},
    {"gradient": "release"},
    {"gradient": "release", "clipping": "exact", "max_grad_norm": 0.5},
    {"gradient": "release", "clipping": "tensor", "max_grad_norm": 0.5},
]


def steps(model: nn.Module, kind, settings) -> list[Tensor]:
    model = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1, **settings)
    for _ in range(2):
        if settings.get("clipping") == "exact":
            with optimizer.measure_norm():
                model(IDS, labels=IDS).loss.backward()
        model(IDS, labels=IDS).loss.backward()
        if not settings:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return tensors(model, optimizer)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
@pytest.mark.parametrize("kind", [QFTLion, QFTAdamW])
def test_the_default_dtype_changes_nothing(kind, matmul, settings, request):
    """Only the model's own dtype counts, while it is quantized and while it trains."""
    model = tiny_llama()
    config = QFTConfig(matmul=matmul)
    quantized = quantize_model_(copy.deepcopy(model), config)
    expected = steps(quantized, kind, settings)

    request.getfixturevalue("default_bf16")
    again = quantize_model_(model, config)

    assert_same_tensors(list(again.state_dict().values()), list(quantized.state_dict().values()))
    assert_same_tensors(steps(again, kind, settings), expected)


def test_a_copy_of_a_model_has_no_gradients_as_any_copy_has_none():
    """Copies once had the INT8 gradients, to which their next backward pass added."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    model(input_ids=IDS, labels=IDS).loss.backward()

    copied = copy.deepcopy(model)

    assert {parameter.grad for parameter in copied.parameters()} == {None}
    assert all(parameter.grad is not None for parameter in model.parameters())
    copied(input_ids=IDS, labels=IDS).loss.backward()
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        first, second = (
            grad.dequantize() if isinstance(grad, Int8Gradient) else grad
            for grad in (one.grad, other.grad)
        )
        assert torch.equal(first, second)


def test_the_decay_of_another_optimizer_is_refused_before_it_changes_anything():
    """The scales had been multiplied by 1 - lr * weight_decay when the update was refused."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, foreach=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(NotImplementedError, match=r"aten\.mul_.*would write to QFTWeight"):
        optimizer.step()
    assert_same_tensors(model.state_dict(), before)
