"""PEFT's interface: `PeftModel`, a façade around an `IA3Model`, and PEFT's functions.

As in PEFT there are two objects: `peft_model.base_model` is the `IA3Model`, `peft_model.base_model.model` the
transformers model. Parameters and states have PEFT's names (`base_model.model.<path>.ia3_l.<adapter>`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.modules.module import _IncompatibleKeys

from ia3.adapter.adapted import find_adapted, look_through
from ia3.adapter.config import IA3Config, TaskType, require_config
from ia3.adapter.layer import IA3Layer
from ia3.adapter.merging import discard
from ia3.adapter.model import IA3Model
from ia3.adapter.routing import Member
from ia3.adapter.state_dict import PREFIX, clean_name
from ia3.adapter.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from ia3.adapter.targets import TASK_HEADS, base_modules, matches, resolve
from ia3.errors import InputError, shown
from ia3.files import HUB_ARGUMENTS

# PEFT's names for errors and warnings.
PeftError = NoMatchingPeftModuleError = InputError
PeftWarning = UserWarning


def _of_base(name: str) -> Any:
    """Make a method or property of `IA3Model` one of the façade."""
    original = inspect.getattr_static(IA3Model, name)
    if isinstance(original, property):
        return property(lambda self: getattr(self.base_model, name), doc=original.__doc__)

    @functools.wraps(original)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base_model, name)(*args, **kwargs)

    return method


class PeftModel(nn.Module):
    """A pretrained model with (IA)³ adapters, with PEFT's interface.

    ```python
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("…"), IA3Config(task_type="CAUSAL_LM"))
    model.base_model  # the IA3Model, which adds, switches, composes and merges adapters
    model.base_model.model  # the transformers model
    ```

    Other attributes come from the `IA3Model`, and then from the base model.

    Args:
        model: the base model; adapted in place.
        peft_config: the first adapter's config.
        adapter_name: its name.
        autocast_adapter_dtype: float32 vectors; False: vectors with the dtype of their layers.
        low_cpu_mem_usage: create vectors without memory (on the meta device), for a checkpoint to fill.

    Raises:
        InputError: the config fits no module of the model; see `resolve`.
    """

    # Tells transformers.Trainer that a quantized base model can be trained, because only adapters are.
    _hf_peft_config_loaded = True

    special_peft_forward_args = frozenset({"adapter_names"})

    base_model: IA3Model

    def __init__(
        self,
        model: nn.Module,
        peft_config: IA3Config,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._ia3_complete(peft_config)
        self._ia3_take(IA3Model(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype))

    @classmethod
    def _ia3_complete(cls, peft_config: IA3Config) -> None:
        """Add the fields to a config that all adapters of this class have."""
        require_config(peft_config)

    def _ia3_take(self, adapted: IA3Model) -> None:
        self.base_model = adapted
        self.peft_type = adapted.peft_type
        if any(getattr(module, "gradient_checkpointing", False) for module in adapted.model.modules()):
            self.prepare_model_for_gradient_checkpointing(adapted.model)
        self.training = adapted.training  # the modules inside keep their modes

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Add a saved adapter to a base model. The adapter's task decides the class.

        If an earlier call added an adapter of this name to the model, it is replaced, with a warning.

        Args and errors: see `IA3Model.from_pretrained`.
        """
        base = _base_in(model)
        if _has_adapter(base, adapter_name):
            place = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            IA3Config.from_pretrained(model_id, **place)  # raises before the earlier adapter is removed
            _replace_earlier(base, adapter_name)
        adapted = IA3Model.from_pretrained(
            base,
            model_id,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            **kwargs,
        )
        chosen = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapted.peft_config[adapter_name].task_type or "", cls)
        peft_model = chosen.__new__(chosen)
        nn.Module.__init__(peft_model)
        peft_model._ia3_take(adapted)
        return peft_model

    # `isinstance(model, peft.PeftModel)` holds, for the trainers of transformers and TRL and for accelerate.

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return _appearance(type(self), sys.modules.get("peft") is not None)

    @__class__.setter
    def __class__(self, value: type) -> None:
        # FSDP2 makes a subclass of `model.__class__`. Use the real class for it, or it would have PEFT's methods.
        told, own = self.__class__, type(self)
        if told is not own and told in value.__bases__:
            bases = tuple(own if base is told else base for base in value.__bases__)
            value = type(value.__name__, bases, dict(value.__dict__))
        object.__dict__["__class__"].__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_blank, (type(self),), *super().__reduce_ex__(protocol)[2:])  # type: ignore[misc]

    # Attributes of the IA3Model that this class also has.

    active_adapter = _of_base("active_adapter")
    active_adapters = _of_base("active_adapters")
    add_adapter = _of_base("add_adapter")
    set_adapter = _of_base("set_adapter")
    delete_adapter = _of_base("delete_adapter")
    disable_adapter = _of_base("disable_adapter")
    set_requires_grad = _of_base("set_requires_grad")
    save_pretrained = _of_base("save_pretrained")
    push_to_hub = _of_base("push_to_hub")
    create_or_update_model_card = _of_base("create_or_update_model_card")
    print_trainable_parameters = _of_base("print_trainable_parameters")
    get_nb_trainable_parameters = _of_base("get_nb_trainable_parameters")
    supports_lora_conversion = _of_base("supports_lora_conversion")
    get_base_model = _of_base("get_base_model")

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        """Adapter name → config."""
        return self.base_model.peft_config

    @functools.wraps(IA3Model.load_adapter)
    def load_adapter(self, *args: Any, **kwargs: Any) -> _IncompatibleKeys:
        result = self.base_model.load_adapter(*args, **kwargs)
        self.training = self.base_model.training
        return result

    @property
    def active_peft_config(self) -> IA3Config:
        """The config of the active adapter; of several, the first one's."""
        if not self.active_adapters:
            raise InputError(f"No adapter is active; there are {shown(self.peft_config, 20)}: call set_adapter.")
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and enabled."""
        return self.base_model.ia3_routing.enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that any adapter trains in full; None if there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes `num_items_in_batch`, for transformers.Trainer."""
        base = self.get_base_model()
        own = getattr(base, "accepts_loss_kwargs", None)
        kinds = (parameter.kind for parameter in inspect.signature(base.forward).parameters.values())
        return inspect.Parameter.VAR_KEYWORD in kinds if own is None else own

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the input embeddings' output require gradients; otherwise checkpointed layers have none."""
        if not any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            _require_input_gradients(model)
        return model

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each layer with adapters; see `TunerLayerStatus`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapters; see `TunerModelStatus`."""
        return get_model_status(self)

    @functools.wraps(IA3Model.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if "generation_config" in self.__dict__:  # set on this object, for the base model
            self.get_base_model().generation_config = self.__dict__["generation_config"]
        return self.base_model.generate(*args, **kwargs)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward pass. Args and errors: see `IA3Model.forward`."""
        return self.base_model(*args, adapter_names=adapter_names, **kwargs)

    skip_code(forward.__code__)  # see IA3Model.forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        return look_through(self, super().__getattr__("base_model"), name)


@functools.cache
def _appearance(own: type, peft_is_loaded: bool) -> type:
    """The class that `model.__class__` reports: a subclass of ours and of PEFT's class of that name, or, without PEFT,
    of `PreTrainedModel`."""
    if peft_is_loaded:
        # A class derived from one of ours, such as FSDP2's, is treated like ours.
        theirs = next(
            (found for one in own.__mro__ if (found := getattr(sys.modules["peft"], one.__name__, None))), None
        )
    else:
        from transformers import PreTrainedModel as theirs
    return own if theirs is None else type(own.__name__, (own, theirs), {"__module__": own.__module__})


def _blank(own: type[PeftModel]) -> PeftModel:
    """An object for `copy` and `pickle` to fill."""
    return own.__new__(own)


def _forward(*names: str) -> Any:
    """A forward method with PEFT's order of positional arguments, for base models with any order."""

    def forward(self: PeftModel, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(
                f"Expected at most {len(names)} positional arguments ({', '.join(names)}), found {len(args)}."
            )
        if kwargs.pop("task_ids", None) is not None:
            raise InputError(
                "Expected no task_ids, which are for Poly and prompt learning; rows' adapters are adapter_names."
            )
        return self.base_model(**dict(zip(names, args, strict=False)), adapter_names=adapter_names, **kwargs)

    skip_code(forward.__code__)
    forward.__doc__ = PeftModel.forward.__doc__
    kinds = inspect.Parameter
    # Trainer keeps these columns of a data set, if it does not look into the base model.
    also = [name for name in ("token_type_ids", "position_ids", "input_features", "pixel_values") if name not in names]
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("self", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in names),
            *(kinds(name, kinds.KEYWORD_ONLY, default=None) for name in [*also, "adapter_names", "acts_from"]),
            kinds("kwargs", kinds.VAR_KEYWORD),
        ]
    )
    return forward


_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` around a causal language model."""

    forward = _forward(*_INPUTS, "labels", *_OUTPUTS)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's method."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` around an encoder-decoder."""

    forward = _forward(*_INPUTS, *_DECODER, "labels", *_OUTPUTS)
    prepare_inputs_for_generation = PeftModelForCausalLM.prepare_inputs_for_generation


class _WithHead(PeftModel):
    task: ClassVar[TaskType]

    @classmethod
    def _ia3_complete(cls, peft_config: IA3Config) -> None:
        super()._ia3_complete(peft_config)
        heads = TASK_HEADS[cls.task]  # for any task in the config
        peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), *heads]))

    @functools.wraps(IA3Model.add_adapter)
    def add_adapter(self, adapter_name: str, peft_config: IA3Config, *args: Any, **kwargs: Any) -> None:
        self._ia3_complete(peft_config)
        self.base_model.add_adapter(adapter_name, peft_config, *args, **kwargs)


class PeftModelForSequenceClassification(_WithHead):
    """A `PeftModel` around a model with a classification head, which is trained in full."""

    task = TaskType.SEQ_CLS

    forward = _forward(*_INPUTS, "labels", *_OUTPUTS)


class PeftModelForTokenClassification(_WithHead):
    """A `PeftModel` around a model with a token-classification head, which is trained in full."""

    task = TaskType.TOKEN_CLS

    forward = _forward(*_INPUTS, "labels", *_OUTPUTS)


class PeftModelForQuestionAnswering(_WithHead):
    """A `PeftModel` around a model with a question-answering head, which is trained in full."""

    task = TaskType.QUESTION_ANS

    forward = _forward(
        *_INPUTS[:2], "token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions", *_OUTPUTS
    )


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` around a model that returns hidden states."""

    forward = _forward(*_INPUTS, *_OUTPUTS)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: IA3Config,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Add a new (IA)³ adapter to a model. The config's task decides the class.

    If the model already has an adapter of this name, for example because a notebook's cell runs again, it is replaced,
    with a warning.

    Args:
        model: the base model; adapted in place.
        peft_config: the adapter's config. The base model's name is added to it.
        adapter_name: the adapter's name.
        mixed: for PEFT's models with adapters of several methods; True is an error.
        autocast_adapter_dtype: float32 vectors; False: vectors with the dtype of their layers.
        revision: the base model's revision, written into the config.
        low_cpu_mem_usage: create vectors without memory (on the meta device), for a checkpoint to fill.

    Raises:
        InputError: see `IA3Model`.
    """
    if mixed:
        raise InputError("Expected mixed=False: (IA)³ is not among the methods that PEFT mixes in one model.")
    require_config(peft_config)
    base = _base_in(model)
    name = getattr(base, "name_or_path", None)
    name = name if isinstance(name, str) and name else None
    if peft_config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"The config names the base model {peft_config.base_model_name_or_path!r}; it is changed to this one, "
            f"{name!r}.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name
    peft_config.revision = revision or peft_config.revision
    if any(isinstance(module, IA3Layer) for module in base.modules()):
        resolve(base, peft_config)  # raises before an earlier adapter is removed
        if _has_adapter(base, adapter_name):
            _replace_earlier(base, adapter_name)
        else:
            warnings.warn(f"{_EARLIER} They stay in it. {_UNLOAD}", stacklevel=2)
    chosen = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return chosen(base, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


_EARLIER = "The model has (IA)³ adapters of an earlier call."
_UNLOAD = "To start from the base model, call .unload() first."


def _base_in(model: nn.Module) -> nn.Module:
    """The base model in an adapted one, or the model itself."""
    adapted = find_adapted(model)
    return model if adapted is None else adapted.model


def _has_adapter(base: nn.Module, name: str) -> bool:
    return any(name in module.held for module in base.modules() if isinstance(module, Member))


def _replace_earlier(base: nn.Module, name: str) -> None:
    """Remove an adapter that an earlier call added, with a warning."""
    warnings.warn(f"{_EARLIER} Its adapter {name!r} is replaced. {_UNLOAD}", stacklevel=3)
    discard(base, name)


def get_peft_config(config_dict: Mapping[str, Any]) -> IA3Config:
    """The config of a dictionary with a `peft_type`. Raises `InputError` if it is missing or of another method."""
    if "peft_type" not in config_dict:
        raise InputError(f"Expected a peft_type in the config, found {', '.join(config_dict) or 'nothing'}.")
    return IA3Config.from_peft_type(**config_dict)


def inject_adapter_in_model(
    peft_config: IA3Config,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Add an adapter to a model and return that model, without a `PeftModel` around it.

    Args:
        peft_config: the adapter's config.
        model: the base model; adapted in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create vectors without memory (on the meta device), for a checkpoint to fill.
        state_dict: an adapter's tensors. Their modules are the targets, instead of the config's. Their values are not
            loaded; use `set_peft_model_state_dict`.

    Raises:
        InputError: see `IA3Model`.
    """
    if state_dict is not None:
        peft_config = _targets_of(state_dict, peft_config, model)
    if _has_adapter(model, adapter_name):
        resolve(model, peft_config)
        _replace_earlier(model, adapter_name)
    adapted = IA3Model(model, peft_config, adapter_name, low_cpu_mem_usage)
    model.peft_config = {**getattr(model, "peft_config", {}), **adapted.peft_config}  # type: ignore[assignment]
    return model


def _targets_of(state_dict: Mapping[str, torch.Tensor], config: IA3Config, model: nn.Module) -> IA3Config:
    """The config with the modules and sides of an adapter's tensors as its targets."""
    paths = {}
    for key, value in state_dict.items():
        path, marker, _ = clean_name(key).removeprefix(PREFIX).rpartition(".ia3_l")
        if marker:
            paths[path] = value
    modules = base_modules(model)
    missing = sorted(set(paths) - set(modules))
    if missing or not paths:
        raise InputError(
            f"Expected a state_dict with an ia3_l for modules of the model, found {shown(missing, 3) if missing else 'none'}."
        )
    # A vector on the input side of a Linear is a row (1, in), on the output side a column (out, 1); of other shapes the
    # config has to say it.
    sides = {path: value.shape[0] == 1 for path, value in paths.items() if value.dim() == 2 and value.numel() > 1}
    second = {path for path in paths if sides.get(path, matches(path, config.feedforward_modules or ()))}
    return dataclasses.replace(config, target_modules=set(paths), feedforward_modules=second)


def get_base_model_state_dict(model: PeftModel | IA3Model) -> dict[str, torch.Tensor]:
    """The base model's state, with its names without adapters."""
    return dict(_base_state(model).values())


def set_base_model_state_dict(
    model: PeftModel | IA3Model, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load a base model's state, with its names without adapters.

    Returns:
        Missing and unexpected keys.

    Raises:
        RuntimeError: `strict` is set and there are such keys, as in `torch.nn.Module.load_state_dict`.
    """
    names = {name: inner for inner, (name, _) in _base_state(model).items()}
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    if strict and (missing or unexpected):
        raise RuntimeError(f"Error(s) in loading state_dict: missing {shown(missing)}; unexpected {shown(unexpected)}.")
    own = {names[name]: value for name, value in state_dict.items() if name in names}
    model.get_base_model().load_state_dict(own, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def _base_state(model: PeftModel | IA3Model) -> dict[str, tuple[str, torch.Tensor]]:
    """The base model's state: current name → name without adapters, and value."""
    found = {}
    for key, value in model.get_base_model().state_dict().items():
        parts = key.split(".")
        if "ia3_l" not in parts and "modules_to_save" not in parts:
            found[key] = (".".join(part for part in parts if part not in ("base_layer", "original_module")), value)
    return found


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare a quantized transformers model for training adapters, in place.

    All parameters are frozen. 16-bit parameters become float32 if bitsandbytes quantized the others or none are
    quantized. Quantized models get gradient checkpointing.

    Args:
        model: the base model.
        use_gradient_checkpointing: checkpoint the layers of a quantized model.
        gradient_checkpointing_kwargs: arguments of transformers' `gradient_checkpointing_enable`.
        auto_clear_cache: free the accelerator's cached memory after the conversion to float32.
    """
    settings = dict(gradient_checkpointing_kwargs or {})
    method: Any = getattr(model, "quantization_method", None)
    packed = getattr(method, "value", method) in ("gptq", "aqlm", "eetq", "hqq", "torchao") or getattr(
        model, "hqq_quantized", False
    )
    bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    model.requires_grad_(False)
    if not packed:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if (packed or bits) and use_gradient_checkpointing:
        if settings.get("use_reentrant", True):
            _require_input_gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    return model


def _require_input_gradients(model: nn.Module) -> None:
    """Make the output of the input embeddings require gradients."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    elif hasattr(model, "get_input_embeddings"):
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert frozen parameters to `dtype` and trainable ones to float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
