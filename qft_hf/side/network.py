"""`SideNetwork`: narrow layers beside those of a frozen base, fed by its hidden states.

    s_0 = D_0(embedding)
    s_i = layer_i((1 - g_i) D_i(h_i) + g_i s_{i-1}),   g_i = sigmoid(z_i)
    y   = h + U norm(s_L)

`h_i` is what layer i of the base returns, and `h` its last hidden state as its head takes it. `U`
starts at zero, so that the model starts as the base. Source: Zhang et al. 2024, arXiv 2401.07159,
section 3. There it is `y = a h + (1 - a) U s_L` with a number `a` that starts at one: all of the
side network then learns through one number that moves by the learning rate, and slowly.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from .cache import is_cache, make_room_, shift_layer_numbers_
from .config import QSTConfig
from .downsample import downsample
from .replay import Replay
from .sizes import side_config

FIRST_GATE = 0.5  # z, as the authors' code starts it


class SideNetwork(nn.Module):
    """What is trained. `follow` makes it run with a base, layer by layer.

    Parameters are FP32. Beside a base of half precision products are computed in the base's dtype,
    as `torch.autocast` does it; else in that of the parameters, or as autocast that is on decides.

    Attributes:
        config: What it was made from.
        downsamples: `D_0` to `D_L`.
        gates: `z_1` to `z_L`, `[layers, side_width]`.
        layers: Of the base's own classes.
        norm: Of the last state.
        upsample: `U`, `[width, side_width]`. It stays float where the layers are INT8: a row of
            zeros tells no scale.
        frozen: The modules of the model that are not trained, which are not below this one.
        quantization: The `QFTConfig` of its weights; None while they are float.
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
        self.frozen: tuple[nn.Module, ...] = ()
        self.quantization: Any = None
        self._state: Any = None  # s_i, while the base runs
        self._learns = False  # whether autograd was on when the base was called
        self._replay: Replay | None = None  # of the pass that is running
        self._again: Replay | None = None  # that for which the base runs again

    def follow(self, runner: Any, base_layers: Sequence[nn.Module]) -> None:
        """Run with a base from now on.

        Args:
            runner: The module that runs the layers; modified. It computes no gradients any more,
                and to its last hidden state the side network is added.
            base_layers: As this network was made for; modified.
        """
        runner.forward = update_wrapper(partial(self._run, runner.forward), runner.forward)
        base_layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for number, layer in enumerate(base_layers):
            layer.register_forward_hook(partial(self._advance, number), with_kwargs=True)

    def train(self, mode: bool = True) -> "SideNetwork":  # noqa: FBT001, FBT002 torch's
        """Set to training or evaluation; what is frozen has no dropout in either."""
        super().train(mode)
        for module in self.frozen:
            for part in module.modules():
                # Modules of weights alone stay in training: in evaluation on a CPU bitsandbytes
                # stores its weights in another way, which costs digits.
                part.training = mode and bool(part._parameters) and not part._modules
        return self

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of the base; the hooks on its layers run the side network meanwhile."""
        self._learns = torch.is_grad_enabled()
        if self._forgets([*args, *kwargs.values()]):
            run_again = self._run_again(partial(forward, *args, **kwargs))
            self._replay = Replay(list(self.downsamples), run_again)
        try:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            return self._leave(output)
        finally:
            self._state = self._replay = None

    def _forgets(self, arguments: list[Any]) -> bool:
        """Whether the base runs again in backward: where layers do, and somebody learns from it.

        A cache that is passed in would be written to twice.
        """
        return (
            self._learns
            and self.training
            and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
            and any(True for _ in self.downsamples.parameters())
            and not any(is_cache(argument) for argument in arguments)
        )

    def _run_again(self, forward: Callable[[], Any]) -> Callable[[Replay], None]:
        """How to have the base run once more as it runs now, for a replay that learns from it."""
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
        """The first layer of the base is about to run."""
        make_room_([*args, *kwargs.values()], len(self.layers))
        # Detached: who trains adapters has embeddings require gradients.
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        with self._computing(hidden):
            if self._again is not None:
                self._again.learn(0, hidden)
            else:
                self._state = self._narrow(0, hidden)

    def _advance(
        self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """A layer of the base has run: so does the one beside it, with the same arguments."""
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
        """What the base returns, with the side network added to its last hidden state."""
        hidden = output[0]
        with self._computing(hidden):
            update = nn.functional.linear(self.norm(self._state), self.upsample)
            total = hidden + update.to(hidden.dtype)
        if isinstance(output, tuple):
            return (total, *output[1:])
        output.last_hidden_state = total
        return output

    @contextmanager
    def _computing(self, hidden: Tensor) -> Iterator[None]:
        """Autograd as the model was called with, and the precision of the base."""
        precision: Any = nullcontext()
        for dtype in (hidden.dtype, self.gates.dtype):
            if dtype in (torch.bfloat16, torch.float16):
                precision = torch.autocast(hidden.device.type, dtype)
                break
        with torch.set_grad_enabled(self._learns), precision:
            yield


def _side_layer(layer_class: type[nn.Module], sizes: Any, number: int) -> nn.Module:
    """A layer of the base's own class at the side network's sizes.

    Raises:
        ValueError: The class cannot be built so.
    """
    wants_number = "layer_idx" in inspect.signature(layer_class).parameters
    try:
        layer = layer_class(sizes, layer_idx=number) if wants_number else layer_class(sizes)
    except Exception as error:
        raise ValueError(
            f"{layer_class.__name__} cannot be built at width {sizes.hidden_size} with "
            f"{sizes.num_attention_heads} heads: {error} Choose another r, or a model of another "
            "family."
        ) from error
    shift_layer_numbers_(layer, by=sizes.num_hidden_layers)
    return layer


def _first(output: Any) -> Tensor:
    """The hidden state in what a layer returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state
