"""The transformers plug-in: quantizes float checkpoints while they load, and reads INT8 ones.

transformers turns what goes wrong with one tensor into a table on the screen: then it raises a text
of its own, or fills in random values and goes on. So faults are collected while tensors come in and
raised together, by name, when the last one has come.
"""

import logging
from dataclasses import replace
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

from ..layout import GroupLayout, outlier_bytes
from ..nn import (
    QuantizedModule,
    arrangement_of,
    conversion_plan,
    dequantize_modules_,
    mark_tables_,
    own_weights,
    prepare_modules_,
    quantize_modules_,
    weight_names,
)
from ..nn.state import SUFFIXES, listed, weight_from_fields
from ..quant import Arrangement, QFTWeight
from .config import QUANT_METHOD, QFTConfig
from .coverage import added_modules, check_coverage
from .loading_faults import (
    FAULTS_SHOWN,
    check_files,
    check_finite,
    check_shape,
    refuse_several_devices,
    refuse_shards,
)
from .tensor_files import metadata, tensor_names
from .wording import counted

logger = logging.getLogger(__name__)


def _patterns(weight_name: str) -> dict[str, str]:
    """How the loader finds the fields of weights of this name, with the suffix of each.

    Anchored at both ends: to transformers 5.17 a pattern matches wherever it occurs.
    """
    return {rf"\.{weight_name}{suffix}$": suffix for suffix in SUFFIXES.values()}


class _Operation(ConversionOps):
    """A step of loading that reports to its quantizer."""

    def __init__(self, hf_quantizer: "QFTQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Operation":
        """This operation itself: the loader copies it for each weight, and there is one report."""
        return self


class Quantize(_Operation):
    """Float weights of a checkpoint to `QFTWeight`, one at a time."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Quantize what the model holds as INT8; other tensors pass."""
        model = kwargs["model"]
        return {
            name: [self.hf_quantizer.quantize(model, name, _only(tensor))]
            for name, tensor in input_dict.items()
        }


class Assemble(_Operation):
    """The fields of one weight, which may come from several files, to its `QFTWeight`."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Check the fields and wrap them; a weight with a fault is left out."""
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
        pre_quantized: Whether the checkpoint holds INT8 fields; else float weights.
    """

    quantization_config: QFTConfig

    def __init__(self, quantization_config: QFTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.faults: dict[str, str] = {}  # by name of the tensor
        self.missing_names: set[str] = set()  # the loader's own record, which it empties
        self.shapes: dict[str, torch.Size] = {}
        self.state: dict[str, Tensor] | None = None  # to be saved in the place of the model's own

    @property
    def is_trainable(self) -> bool:
        """Yes, with the optimizers of this package."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes: without it the Trainer demands adapters on top of a quantized model."""
        return True

    def is_serializable(self) -> bool:
        """Yes: `state_dict` holds the INT8 fields."""
        return True

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save, and the check sums of all that the files will hold."""
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved, not the model
            return self.state, {}
        self._record_added(model)
        state = model.state_dict() if self.state is None else self.state
        summed = dict(state)
        # A file may have the names and tensors of another layout, which the model was read from.
        # An empty list is tested here: transformers copies each name and tensor for it, too, which
        # takes ten times as long as the check sums.
        if getattr(model, "_weight_conversions", None) != []:
            summed |= revert_weight_conversion(model, dict(state))
        return state, metadata(summed)

    def _record_added(self, model: Any) -> None:
        """Have the configuration list float modules that were added, such as a new head.

        A checkpoint is read as its configuration says, and else would miss their INT8 fields.
        """
        modules = added_modules(model, self.quantization_config)
        weights = {name: own_weights(model.get_submodule(name)).values() for name in modules}
        added = [n for n in modules if any(type(weight) is nn.Parameter for weight in weights[n])]
        if added:
            listed = [*(self.quantization_config.modules_to_not_convert or []), *added]
            config = replace(self.quantization_config, modules_to_not_convert=listed)
            self.quantization_config = model.config.quantization_config = config
            logger.warning(
                "%s, added to the INT8 %s, saved as float: modules_to_not_convert lists it now. "
                "quantize_model_ with the configuration of the model makes such modules INT8",
                ", ".join(added),
                type(model).__name__,
            )
        if modules != added:  # the others are tied to INT8 weights
            prepare_modules_(model, self.quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to offload: its hooks exchange float tensors by name.

        Raises:
            ValueError: The device map leaves modules on disk, or on the CPU beside a GPU.
        """
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, dict):
            return  # such as "auto": comes again as a dictionary
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"The device map puts modules on {sorted(places)}, and INT8 weights cannot be "
                'offloaded. Use device_map="cpu" or devices that hold the model together; a larger '
                "max_memory if it was set too low."
            )

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether the model holds the parameter as INT8."""
        module, name = _module_of(model, param_name)
        return isinstance(module, QuantizedModule) and name in module.weight_names

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element when loaded, for automatic device maps."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        rows, columns = _arrangement(model, param_name).matrix_shape
        config = self.quantization_config
        stored = GroupLayout(rows, columns, config.group_size).stored_bytes
        stored += outlier_bytes(rows, columns, config.outlier_fraction)
        return stored / param.numel()

    def get_quantize_ops(self) -> ConversionOps:
        """What happens to a float weight."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What happens to the fields of an INT8 checkpoint."""
        if not self.pre_quantized:
            return []
        return [
            WeightConverter(list(_patterns(name)), f".{name}", [Assemble(self)])
            for name in weight_names()
        ]

    def quantize(self, model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
        """The `QFTWeight` of a float weight. One with a fault is reported and passes as it is."""
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
        """The weight `name` of its fields by their full names; None if it is at fault."""
        parameter = model.get_parameter(name)
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
                dtype=parameter.dtype,
            )
        except ValueError as error:
            self.faults[name] = str(error)
            return None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        self.faults, self.missing_names = {}, set()
        check_files(kwargs.get("checkpoint_files") or [], pre_quantized=self.pre_quantized)
        refuse_shards(model)
        _tie(model)
        refuse_several_devices(model, kwargs.get("device_map"))
        if self.pre_quantized and (absent := self.quantization_config.forget_absent(model)):
            kept = self._keep_floats(model, kwargs.get("checkpoint_files") or [])
            logger.warning(
                "The checkpoint's quantization_config names %s, which %s does not have: ignored%s",
                ", ".join(dict.fromkeys(absent)),
                type(model).__name__,
                f"; {', '.join(kept)}, float in the checkpoint too, stays so" if kept else "",
            )
        if not self.pre_quantized or self.quantization_config.strict:
            plan = conversion_plan(model, self.quantization_config.modules_to_not_convert)
            check_coverage(model, plan, self.quantization_config)
        prepare_modules_(model, self.quantization_config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return model

    def _keep_floats(self, model: PreTrainedModel, files: list[str]) -> list[str]:
        """Have the configuration list embeddings that are float in `files`; return their names.

        They are where a head is listed that is tied to one, and `model` may have none.
        """
        config = self.quantization_config
        prefix = f"{model.base_model_prefix}."  # which only one of model and checkpoint may have
        held = {name.removeprefix(prefix) for name in tensor_names(files)}
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
                f"into {type(model).__name__}, the first {FAULTS_SHOWN} at most:\n{shown}"
            )
        if not self.pre_quantized:
            # Weights that are not in the checkpoint, such as a new classifier, are float so far.
            quantize_modules_(model, self.quantization_config)
        mark_tables_(model)  # weights are in place and tied only now
        return model

    def save_as_held(self, model: Any) -> None:
        """Have `save_pretrained` write what the modules hold, as long as the model is INT8.

        It reverses what loading did: experts that came one by one are written one by one, which
        INT8 fields cannot be. Parameters still get their names of the checkpoint back.
        """
        used = getattr(model, "_weight_conversions", None)
        if used is None:  # the model was not loaded: transformers would reverse these
            of_class = get_model_conversion_mapping(model, add_legacy=False)
            used = [step for step in of_class if not isinstance(step, PrefixChange)]
        model._weight_conversions = [s for s in used if not isinstance(s, WeightConverter)]

    def _find_missing(self, model: PreTrainedModel) -> None:
        """An INT8 checkpoint is complete: a weight that is not in it would be random."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(p) for name, p in parameters.items() if name not in self.missing_names}
        known = self.faults.keys() | model.all_tied_weights_keys.keys()  # its source tells
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
                    "INT8 model a new head, call dequantize_model_, save, and load that float "
                    "checkpoint with quantization_config=QFTConfig(...)."
                )

    def _find_bad_values(self, model: PreTrainedModel) -> None:
        """Float parameters with a wrong shape, which transformers 5.17 lets pass, or with NaN."""
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
        """Take off every mark of a quantized model."""
        super().remove_quantization_config(model)
        vars(model).pop("_weight_conversions", None)  # saving follows those of the class again
        for config in _configs(model):
            config.__dict__.pop("_is_quantized", None)  # attention asks whether it is there


def _only(tensor: Any) -> Tensor:
    """A tensor that the loader may have put into a list of one."""
    found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found


def _module_of(model: nn.Module, parameter_name: str) -> tuple[nn.Module, str]:
    prefix, _, name = parameter_name.rpartition(".")
    return model.get_submodule(prefix), name


def _arrangement(model: nn.Module, parameter_name: str) -> Arrangement:
    """How a weight that is, or will be, quantized is a matrix."""
    module, name = _module_of(model, parameter_name)
    return arrangement_of(module, name)


def _tie(skeleton: PreTrainedModel) -> None:
    """Share what will be shared: the rule of conversion must see it, and loading ties last."""
    for target, source in skeleton.all_tied_weights_keys.items():
        module, name = _module_of(skeleton, target)
        setattr(module, name, skeleton.get_parameter_or_buffer(source))


def _configs(model: nn.Module) -> list[Any]:
    """Configurations of a model and of the models inside it."""
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
