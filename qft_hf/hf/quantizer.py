"""The transformers plug-in: quantizes float checkpoints while they load, and reads INT8 ones.

transformers reports an error with one tensor only in a printed table; then it raises a text of its
own, or fills in random values and continues. So faults are collected while tensors are loaded, and
raised together, by name, after the last one.
"""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..kernels.checks import FLOATS
from ..nn import (
    QuantizedModule,
    arrangement_of,
    conversion_plan,
    dequantize_modules_,
    mark_tables_,
    prepare_modules_,
    quantize_modules_,
    weight_names,
)
from ..nn.state import SUFFIXES, listed, state_names, weight_from_fields
from ..quant import Arrangement, QFTWeight
from .config import QUANT_METHOD, QFTConfig
from .coverage import check_coverage
from .loading_faults import (
    FAULTS_SHOWN,
    check_files,
    check_finite,
    check_shape,
    refuse_several_devices,
    refuse_shards,
)
from .saved_names import with_own_names
from .tensor_files import metadata, tensor_names
from .wording import counted

logger = logging.getLogger(__name__)


def _patterns(weight_name: str) -> dict[str, str]:
    """Return the patterns by which the loader finds the fields of a weight, and their suffixes.

    Patterns are anchored at both ends: transformers 5.17 matches a pattern anywhere in a name.
    """
    return {rf"\.{weight_name}{suffix}$": suffix for suffix in SUFFIXES.values()}


class _Operation(ConversionOps):
    """A loading step that reports faults to its quantizer."""

    def __init__(self, hf_quantizer: "QFTQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Operation":
        """Return this operation itself: the loader copies it per weight, but faults are shared."""
        return self


class Quantize(_Operation):
    """Converts float weights of a checkpoint to `QFTWeight`, one at a time."""

    def convert(
        self, input_dict: dict[str, Any], *patterns: Any, **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Quantize the weights that the model holds as INT8; return other tensors unchanged."""
        model = kwargs["model"]
        return {
            name: [self.hf_quantizer.quantize(model, name, _only(tensor))]
            for name, tensor in input_dict.items()
        }


class Assemble(_Operation):
    """Combines the fields of one weight, possibly from several files, into its `QFTWeight`."""

    def convert(
        self, input_dict: dict[str, Any], *patterns: Any, **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Check the fields and wrap them; leave out a weight with a fault."""
        name = kwargs["full_layer_name"]
        self.hf_quantizer.missing_names = kwargs["missing_keys"]
        suffixes = _patterns(name.rpartition(".")[2])
        fields = {name + suffixes[key]: _only(tensor) for key, tensor in input_dict.items()}
        weight = self.hf_quantizer.assemble(kwargs["model"], name, fields)
        return {} if weight is None else {name: [weight]}


@register_quantizer(QUANT_METHOD)
class QFTQuantizer(HfQuantizer):
    """Makes and reads models whose linear and embedding weights are `QFTWeight`.

    Args:
        quantization_config: The storage format.
        pre_quantized: Whether the checkpoint holds INT8 fields, and not float weights.
    """

    quantization_config: QFTConfig

    def __init__(self, quantization_config: QFTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.faults: dict[str, str] = {}  # by name of the tensor
        self.missing_names: set[str] = set()  # the loader's own set, from which it removes names
        self.shapes: dict[str, torch.Size] = {}
        self.state: dict[str, Tensor] | None = None  # saved instead of the model's own state dict

    @property
    def is_trainable(self) -> bool:
        """True: with the optimizers of this package."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: otherwise the Trainer requires adapters on top of a quantized model."""
        return True

    def is_serializable(self) -> bool:
        """Return True: `state_dict` holds the INT8 fields."""
        return True

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the tensors to save, and the check sums of all tensors in the files."""
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved, not the model
            return self.state, {}
        state = model.state_dict() if self.state is None else self.state
        summed = dict(state)
        # The files may get the names and tensors of another layout, from which the model was read.
        # An empty list is tested here: even for it transformers copies each name and tensor, which
        # takes ten times as long as the check sums.
        if getattr(model, "_weight_conversions", None) != []:
            summed |= revert_weight_conversion(model, dict(state))
        return state, metadata(summed)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse offloading, whose hooks move float tensors by name.

        Raises:
            ValueError: The device map puts modules on disk, or on the CPU in addition to a GPU.
        """
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, dict):
            return  # a string such as "auto" is resolved, and checked again as a dictionary
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"The device map puts modules on {sorted(places)}, and INT8 weights cannot be "
                'offloaded. Use device_map="cpu", or devices that together can hold the model, and '
                "a larger max_memory if it was set too low."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that INT8 weights stand for, which was asked for.

        Raises:
            ValueError: There is no kernel for it.
        """
        if dtype not in FLOATS:
            raise ValueError(
                f"An INT8 model was to be loaded with dtype={dtype}. Its weights stand for "
                f"{', '.join(map(str, FLOATS))}: load it with one of these."
            )
        return dtype

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Return whether the model holds the parameter as INT8."""
        module, name = _module_of(model, param_name)
        return isinstance(module, QuantizedModule) and name in type(module).weight_names

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes per element when loaded, for automatic device maps."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        weight = QFTWeight.empty(_arrangement(model, param_name), self.quantization_config)
        return weight.stored_bytes / param.numel()

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a float weight."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return the conversions of the fields in an INT8 checkpoint; none for a float one."""
        if not self.pre_quantized:
            return []
        return [
            WeightConverter(list(_patterns(name)), f".{name}", [Assemble(self)])
            for name in weight_names()
        ]

    def quantize(self, model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
        """Return the `QFTWeight` of a float weight; on a fault, record it and return `tensor`."""
        if not self.param_needs_quantization(model, name):
            return tensor
        try:
            arrangement = _arrangement(model, name)
            check_shape(name, tensor, arrangement.shape)
            return QFTWeight.from_float(
                tensor, self.quantization_config, name=name, transposed=arrangement.transposed
            )
        except ValueError as error:
            self.faults[name] = str(error)
            return tensor

    def assemble(
        self, model: PreTrainedModel, name: str, fields: dict[str, Tensor]
    ) -> QFTWeight | None:
        """Return the weight `name`, made from its fields by full name; None if it has a fault."""
        try:
            if not self.param_needs_quantization(model, name):
                raise ValueError(
                    f"{listed(fields)} are in the checkpoint, and {name} is not quantized "
                    "in this model. Load it with the class it was saved from, and leave "
                    "modules_to_not_convert in its config.json as it was."
                )
            return weight_from_fields(
                fields,
                self.quantization_config,
                name=name,
                arrangement=_arrangement(model, name),
                dtype=_loaded_dtype(model, name),
            )
        except ValueError as error:
            self.faults[name] = str(error)
            return None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        self.faults, self.missing_names = {}, set()
        files: list[str] = kwargs.get("checkpoint_files") or []
        check_files(files, pre_quantized=self.pre_quantized)
        refuse_shards(model)
        held = with_own_names(model, tensor_names(files))
        _tie(model, held)
        refuse_several_devices(model, kwargs.get("device_map"))
        if self.pre_quantized and (absent := self.quantization_config.forget_absent(model)):
            kept = self._keep_floats(model, held)
            logger.warning(
                "The checkpoint's quantization_config names %s, which %s does not have: ignored%s",
                ", ".join(dict.fromkeys(absent)),
                type(model).__name__,
                f"; {', '.join(kept)} is float in the checkpoint and stays float" if kept else "",
            )
        if not self.pre_quantized or self.quantization_config.strict:
            plan = conversion_plan(model, self.quantization_config.modules_to_not_convert)
            check_coverage(model, plan, self.quantization_config)
        prepare_modules_(model, self.quantization_config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return model

    def _keep_floats(self, model: PreTrainedModel, held: set[str]) -> list[str]:
        """List embeddings that are float in a checkpoint in the configuration; return their names.

        An embedding is float if the configuration lists a head tied to it, and `model` may not have
        that head.
        """
        config = self.quantization_config
        prefix = f"{model.base_model_prefix}."  # possibly in only one of model and checkpoint
        held = {name.removeprefix(prefix) for name in held}
        plan = conversion_plan(model, config.modules_to_not_convert)
        floats = [
            name
            for name, module in plan.modules.items()
            if isinstance(module, nn.Embedding) and f"{name}.weight".removeprefix(prefix) in held
        ]
        if floats:
            config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *floats]
        return floats

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.save_as_held(model)
        if self.pre_quantized:
            self._find_missing(model)
        self._find_bad_values(model)
        if self.faults:
            shown = "\n".join(f"- {fault}" for fault in list(self.faults.values())[:FAULTS_SHOWN])
            n_faults = counted(len(self.faults), "tensor")
            raise ValueError(
                f"{n_faults} of {model.name_or_path or 'the state dict'} cannot be loaded "
                f"into {type(model).__name__}; at most {FAULTS_SHOWN} are listed:\n{shown}"
            )
        if not self.pre_quantized:
            # Weights that are not in the checkpoint, such as a new classifier's, are still float.
            quantize_modules_(model, self.quantization_config)
        mark_tables_(model)  # only now are weights in place and tied
        return model

    def save_as_held(self, model: Any) -> None:
        """Make `save_pretrained` write tensors as the modules hold them, while the model is INT8.

        By default it reverses the conversions of loading: experts that were loaded one by one are
        written one by one, and INT8 fields cannot be split so. Parameters still get the names of
        the checkpoint.
        """
        used = getattr(model, "_weight_conversions", None)
        if used is None:  # the model was not loaded: transformers would reverse those of its class
            of_class = get_model_conversion_mapping(model, add_legacy=False)
            used = [step for step in of_class if not isinstance(step, PrefixChange)]
        model._weight_conversions = [s for s in used if not isinstance(s, WeightConverter)]

    def _find_missing(self, model: PreTrainedModel) -> None:
        """Record weights that are not in an INT8 checkpoint: they would be random."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(p) for name, p in parameters.items() if name not in self.missing_names}
        # A tied weight is checked at its source.
        known = self.faults.keys() | model.all_tied_weights_keys.keys()
        for name, parameter in parameters.items():
            quantized = self.param_needs_quantization(model, name)
            if isinstance(parameter, QFTWeight) or name in known:
                continue
            if quantized and getattr(parameter, "_is_hf_initialized", False):
                self.faults[name] = (
                    f"{name} is in the checkpoint as a float tensor, and config.json says that it "
                    "is quantized. Save the model again, or list the module in "
                    "modules_to_not_convert of config.json to keep it float."
                )
            elif quantized or id(parameter) not in loaded:
                wanted = name + "_q" if quantized else name
                self.faults[name] = (
                    f"{wanted} is missing from the checkpoint. Copy or save it again. To give an "
                    "INT8 model a new head, start from a float checkpoint of it, which `qft-hf "
                    "export` writes, or dequantize_model_ and save_pretrained."
                )

    def _find_bad_values(self, model: PreTrainedModel) -> None:
        """Record wrong shapes, which transformers 5.17 accepts, and non-finite float parameters."""
        for name, parameter in model.named_parameters():
            if name in self.faults or parameter.is_meta:
                continue
            try:
                check_shape(name, parameter, self.shapes.get(name, parameter.shape))
                if not isinstance(parameter, QFTWeight):
                    check_finite(name, parameter)
            except ValueError as error:
                self.faults[name] = str(error)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        # config.dtype, the default, is a string once the model has been saved.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize_modules_(model, dtype)
        for config in _configs(model):
            config.dtype = dtype
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove all attributes that mark a model as quantized."""
        super().remove_quantization_config(model)
        vars(model).pop("_weight_conversions", None)  # saving uses those of the class again
        for config in _configs(model):
            config.__dict__.pop("_is_quantized", None)  # attention checks whether it exists


def _only(tensor: Any) -> Tensor:
    """Return a tensor that the loader may have put into a list of one."""
    found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found


def _module_of(model: nn.Module, parameter_name: str) -> tuple[nn.Module, str]:
    prefix, _, name = parameter_name.rpartition(".")
    return model.get_submodule(prefix), name


def _arrangement(model: nn.Module, parameter_name: str) -> Arrangement:
    """Return how the values of a weight that is, or will be, quantized lie in its matrix."""
    module, name = _module_of(model, parameter_name)
    return arrangement_of(module, name)


def _loaded_dtype(model: PreTrainedModel, parameter_name: str) -> torch.dtype:
    """Return the dtype as which a parameter is loaded; float16 models keep some of them in FP32."""
    dtype = model.get_parameter(parameter_name).dtype
    plan = model._get_dtype_plan(dtype)
    found = (plan[p] for p in plan if re.search(p.replace("*", ".*"), parameter_name))
    return next(found, dtype)


def _tie(skeleton: PreTrainedModel, held: set[str]) -> None:
    """Tie weights in advance: the conversion plan must see ties, and loading ties weights last.

    Two weights of which a checkpoint has one in INT8 and the other in float stay apart: the model
    that was saved had one of them replaced, and transformers ties no weights that it finds to
    differ.

    Args:
        skeleton: The model, without values; modified.
        held: Names of the tensors in the checkpoint.
    """
    for target, source in skeleton.all_tied_weights_keys.items():
        pairs = (target, source), (source, target)
        if any({a_float, state_names(an_int8)["codes"]} <= held for a_float, an_int8 in pairs):
            continue
        module, name = _module_of(skeleton, target)
        setattr(module, name, skeleton.get_parameter_or_buffer(source))


def _configs(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and of the models inside it."""
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
