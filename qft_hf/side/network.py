"""`SideNetwork`: narrow layers that run next to those of a frozen base, on its hidden states.

    s_0 = D_0(embedding)
    s_i = layer_i((1 - g_i) D_i(h_i) + g_i s_{i-1}),   g_i = sigmoid(z_i)
    y   = h + U norm(s_L)

`h_i` is the output of layer i of the base, and `h` its last hidden state as the head reads it. `U`
starts at zero, so the model starts as the base. Source: Zhang et al. 2024, arXiv 2401.07159,
section 3. There `y = a h + (1 - a) U s_L` with a scalar `a` that starts at one: gradients of the
side network then have the factor `1 - a`, which grows from zero, slowly, at the learning rate.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .cache import is_cache, make_room_, shift_layer_numbers_
from .config import QSTConfig
from .downsample import downsample
from .replay import Replay
from .sizes import side_config

FIRST_GATE = 0.5  # initial z, as in the authors' code


class SideNetwork(nn.Module):
    """The trained network; `follow` makes it run with a base, layer by layer.

    Parameters are FP32. With a half-precision base, products are computed in the base's dtype by
    `torch.autocast`; otherwise in the dtype of the parameters, or as active autocast decides.

    Attributes:
        config: The configuration that it was built from.
        downsamples: `D_0` to `D_L`.
        gates: `z_1` to `z_L`, `[layers, side_width]`.
        layers: The side layers, of the base's own classes.
        norm: The norm of the last state.
        upsample: `U`, `[width, side_width]`. It stays float if the layers are INT8: a row of zeros
            determines no scale.
        frozen: The modules of the model that are not trained; they are not submodules of this one.
    """

    def __init__(self, base_layers: Sequence[nn.Module], base_config: Any, config: QSTConfig):
        super().__init__()
        self.config = config
        sizes = side_config(base_config, config)
        width = base_config.get_text_config().hidden_size
        n_layers = len(base_layers)
        self.downsamples = nn.ModuleList(
            downsample(width, sizes.hidden_size, config) for _ in range(n_layers + 1)
        )
        self.gates = nn.Parameter(torch.full((n_layers, sizes.hidden_size), FIRST_GATE))
        self.layers = nn.ModuleList(
            _side_layer(type(layer), sizes, number) for number, layer in enumerate(base_layers)
        )
        self.norm = nn.RMSNorm(sizes.hidden_size, eps=1e-6)
        self.upsample = nn.Parameter(torch.zeros(width, sizes.hidden_size))
        self._sizes, self._base_config = sizes, base_config.get_text_config()
        self.frozen: tuple[nn.Module, ...] = ()
        self._state: Any = None  # s_i, while the base runs
        self._learns = False  # whether autograd was on when the base was called
        self._replay: Replay | None = None  # replay of the current forward pass
        self._again: Replay | None = None  # replay for which the base is running again

    def follow(self, runner: Any, base_layers: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Attach to a base, so that this network runs whenever the base does.

        Args:
            runner: The module that runs the layers; modified. It no longer computes gradients, and
                the output of the side network is added to its last hidden state.
            base_layers: The layers that this network was built for; modified.

        Returns:
            The hooks on the layers.
        """
        runner.forward = update_wrapper(partial(self._run, runner.forward), runner.forward)
        return [
            base_layers[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            *(
                layer.register_forward_hook(partial(self._advance, number), with_kwargs=True)
                for number, layer in enumerate(base_layers)
            ),
        ]

    def train(self, mode: bool = True) -> "SideNetwork":  # noqa: FBT001, FBT002 torch's
        """Set training or evaluation mode; frozen modules have no dropout in either."""
        super().train(mode)
        for module in self.frozen:
            for part in module.modules():
                # Leaf modules with parameters follow the mode: in evaluation on a CPU, bitsandbytes
                # stores its weights in another way, which loses precision.
                part.training = mode and bool(part._parameters) and not part._modules
        return self

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the base, while hooks on its layers run the side network."""
        self._learns = torch.is_grad_enabled()
        # Side layers get the masks of the base, whose form depends on its attention kernels.
        if self._sizes._attn_implementation != self._base_config._attn_implementation:
            self._sizes._attn_implementation = self._base_config._attn_implementation
        if self._recomputes_base([*args, *kwargs.values()]):
            run_again = self._run_again(partial(forward, *args, **kwargs))
            self._replay = Replay(list(self.downsamples), run_again)
        try:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            return self._leave(output)
        finally:
            self._state = self._replay = None

    def _recomputes_base(self, arguments: list[Any]) -> bool:
        """Return whether the base runs again in backward, to train downsample modules.

        It does if side layers are checkpointed, except with a cache: it would write to that twice.
        """
        return (
            self._learns
            and self.training
            and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
            and any(parameter.requires_grad for parameter in self.downsamples.parameters())
            and not any(is_cache(argument) for argument in arguments)
        )

    def _run_again(self, forward: Callable[[], Any]) -> Callable[[Replay], None]:
        """Return a function that runs the base again under the current autocast, for a replay."""
        device = self.gates.device.type
        is_autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run_again(replay: Replay) -> None:
            self._again = replay
            try:
                with torch.no_grad(), torch.autocast(device, dtype, enabled=is_autocast):
                    forward()
            finally:
                self._again = None

        return run_again

    def _narrow(self, number: int, hidden: Tensor) -> Any:
        if self._replay is not None:
            return self._replay.narrow(number, hidden)
        return self.downsamples[number](hidden)

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook before the first layer of the base: start the side network."""
        make_room_([*args, *kwargs.values()], len(self.layers))
        # Detached: code that trains adapters makes the outputs of embeddings require gradients.
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        with self._computing(hidden):
            if self._again is not None:
                self._again.learn(0, hidden)
            else:
                self._state = self._narrow(0, hidden)

    def _advance(
        self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook after a layer of the base: run its side layer with the same arguments."""
        hidden = _first(output)
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        with self._computing(hidden):
            if self._again is not None:
                self._again.learn(number + 1, hidden)
                return
            gate = torch.sigmoid(self.gates[number])
            state = (1 - gate) * self._narrow(number + 1, hidden) + gate * self._state
            self._state = _first(self.layers[number](state, *args[1:], **named))

    def _leave(self, output: Any) -> Any:
        """Return the output of the base, with the side network added to its last hidden state."""
        hidden = output[0]
        with self._computing(hidden):
            update = nn.functional.linear(self.norm(self._state), self.upsample)
            total = hidden + update.to(hidden.dtype)
        if isinstance(output, tuple):
            return (total, *(_ending_with(total, hidden, value) for value in output[1:]))
        for name, value in list(output.items()):
            output[name] = _ending_with(total, hidden, value)
        output.last_hidden_state = total
        return output

    @contextmanager
    def _computing(self, hidden: Tensor) -> Iterator[None]:
        """Compute with the autograd mode of the model's call and in the precision of the base."""
        precision: Any = nullcontext()
        for dtype in (hidden.dtype, self.gates.dtype):
            if dtype in (torch.bfloat16, torch.float16):
                precision = torch.autocast(hidden.device.type, dtype)
                break
        with torch.set_grad_enabled(self._learns), precision:
            yield


def _side_layer(layer_class: type[nn.Module], sizes: Any, number: int) -> nn.Module:
    """Return a layer of the base's own class at the side network's sizes.

    Raises:
        ValueError: The class cannot be built at these sizes.
    """
    wants_number = "layer_idx" in inspect.signature(layer_class).parameters
    try:
        layer = layer_class(sizes, layer_idx=number) if wants_number else layer_class(sizes)
    except Exception as error:
        raise ValueError(
            f"{layer_class.__name__} cannot be built at width {sizes.hidden_size} with "
            f"{sizes.num_attention_heads} heads: {str(error).rstrip('.')}. Choose another r, or a "
            "model of another family."
        ) from error
    shift_layer_numbers_(layer, by=sizes.num_hidden_layers)
    return layer


def _ending_with(total: Tensor, last: Tensor, value: Any) -> Any:
    """Return `value`; if it is the hidden states that end with `last`, they end with `total`."""
    if isinstance(value, tuple) and value and value[-1] is last:
        return (*value[:-1], total)
    return value


def _first(output: Any) -> Tensor:
    """Return the hidden state in the output of a layer."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
