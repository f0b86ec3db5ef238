"""Add, switch and remove adapters of a model: `Adapted`, `find_adapted`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ia3.adapter import quantized
from ia3.adapter.config import IA3Config, PeftType, require_config
from ia3.adapter.layer import IA3Layer
from ia3.adapter.merging import sync_weights
from ia3.adapter.routing import Bank, Routing
from ia3.adapter.rows import BASE
from ia3.adapter.stored import StoredAdapter
from ia3.adapter.targets import (
    Target,
    base_modules,
    has_encoder,
    inside_wrappers,
    outside_decoder,
    resolve,
    shortest_names,
    wrappers,
)
from ia3.adapter.trained import TrainedModule
from ia3.adapter.wrapping import check_copies, find_routing, insert, remove, take_out_idle, wrap
from ia3.errors import InputError, shown


class Adapted(nn.Module):
    """A base model to which adapters are added, activated and removed; `IA3Model` does the rest.

    Args, attributes and errors: see `IA3Model`.
    """

    # Our names that PEFT lacks contain "adapter" or "ia3", so that they hide no attribute of the base model.

    peft_type = PeftType.IA3
    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    uses_shared_state = False

    # Tells transformers.Trainer that a quantized base model can be trained, because only adapters are.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        model: nn.Module,
        config: IA3Config | Mapping[str, IA3Config] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(config, nn.Module):
            model, config = config, model  # type: ignore[assignment]
        if not isinstance(model, nn.Module) or config is None:
            raise InputError("Expected a model and an IA3Config: IA3Model(model, config).")
        configs = dict(config) if isinstance(config, Mapping) else {adapter_name: config}
        with self._ia3_wrapping(model):
            for name, one in configs.items():
                self.add_adapter(name, one, low_cpu_mem_usage, autocast_adapter_dtype)
        for first in list(configs)[:1]:
            self.set_adapter(first, inference_mode=configs[first].inference_mode)

    @contextmanager
    def _ia3_wrapping(self, model: nn.Module) -> Iterator[None]:
        """Take over a base model: freeze it, and keep what is added in the `with` block, unless that fails."""
        self.model = model
        self.peft_config: dict[str, IA3Config] = {}
        self.adapter_folders: dict[str, StoredAdapter] = {}  # the other files of each adapter's folder
        self._ia3_trainable: set[str] = set()  # the adapters to freeze when others become active
        quantized.release_dequantized(model)
        quantized.keep_plain_layout(model)
        self._ia3_blocking = [
            path
            for path, module in base_modules(model).items()
            if quantized.is_quantized(module) and not quantized.passes_gradients(module)
        ]
        # Layers of an earlier adapter in the model still use their `Routing`, so this model uses it too.
        self.ia3_routing = find_routing(model) or Routing()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            yield
        except BaseException:
            for name in list(self.peft_config):
                self.delete_adapter(name)
            raise
        for parameter in trainable:
            parameter.requires_grad_(False)

    # The parts of the model that belong to adapters, by path in the base model.

    @property
    def ia3_layers(self) -> dict[str, IA3Layer]:
        """The rescaled layers by path in the base model."""
        return wrappers(self.model)[0]

    @property
    def ia3_trained_modules(self) -> dict[str, TrainedModule]:
        """The modules of `modules_to_save` by path in the base model."""
        return wrappers(self.model)[1]

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """An adapter's parameters: its vectors, and its copies of `modules_to_save`."""
        for member in self.ia3_routing.members:
            yield from member.parameters_of(name)

    def require_adapters(self, names: Iterable[str]) -> None:
        """Raise `InputError` for a name that no adapter has."""
        for name in names:
            if name not in self.peft_config:
                raise InputError(f"Adapter {name!r} does not exist; there are {shown(self.peft_config, 20)}.")

    # Adding and removing.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: IA3Config,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        key_value_only: bool | None = None,
    ) -> None:
        """Add another adapter. It is inactive and frozen; `set_adapter` activates it.

        Args:
            adapter_name: an unused name without a dot.
            peft_config: see `IA3Config`. It is completed in place after the adapter is added, as in PEFT.
            low_cpu_mem_usage: create vectors without memory (on the meta device), for a checkpoint to fill.
            autocast_adapter_dtype: float32 vectors; False: vectors with the dtype of their layers.
            key_value_only: see `resolve`.

        Raises:
            InputError: the name is taken or not allowed, or the config does not fit the model.
        """
        if isinstance(adapter_name, IA3Config):  # the order of transformers' mixin
            adapter_name, peft_config = peft_config or "default", adapter_name  # type: ignore[assignment]
        self._ia3_check_name(adapter_name)
        require_config(peft_config)
        found = resolve(self.model, peft_config, key_value_only)
        vector = {"ones": found.config.init_ia3_weights, "meta": low_cpu_mem_usage, "float32": autocast_adapter_dtype}
        insert(self.model, self.ia3_routing, adapter_name, found.targets, found.kept, **vector)
        vars(peft_config).update(vars(found.config))
        self._ia3_keep_config(adapter_name, peft_config)

    def _ia3_keep_config(self, name: str, config: IA3Config) -> None:
        self.peft_config[name] = config
        # In an encoder-decoder such an adapter has no vectors in the encoder, and acts wherever it has some.
        if config.acts_from == "question" and not has_encoder(self.model):
            self.ia3_routing.from_question.add(name)

    def _ia3_check_name(self, name: str) -> None:
        if name in self.peft_config:
            raise InputError(f"Adapter with name {name!r} already exists; choose another name or delete it.")
        if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
            raise InputError(
                f"Expected an adapter name that is not empty, has no dot and is no word of Python's dictionaries or "
                f"'__base__', found {name!r}."
            )
        if any(name in member.held for member in self.ia3_routing.members):
            raise InputError(
                f"The model has an adapter {name!r} of an earlier IA3Model; unload that or choose another name."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first remaining adapter becomes active, with a warning.

        Raises:
            InputError: there is no such adapter, or it is merged into the weights.
        """
        self.require_adapters([adapter_name])
        if adapter_name in self.ia3_routing.merged:
            raise InputError(f"Adapter {adapter_name!r} is merged into the weights; call unmerge_adapter() first.")
        remove(self.model, self.ia3_routing, adapter_name)
        del self.peft_config[adapter_name]
        self.ia3_routing.from_question.discard(adapter_name)
        self.adapter_folders.pop(adapter_name, None)
        self._ia3_trainable.discard(adapter_name)
        if adapter_name in self.ia3_routing.active:
            left = [name for name in self.ia3_routing.active if name != adapter_name] or list(self.peft_config)[:1]
            if left:
                warnings.warn(
                    f"Adapter {adapter_name!r} was active and is now deleted. Active now: {shown(left, 20)}.",
                    stacklevel=2,
                )
                self.set_adapter(left)
            else:
                self.ia3_routing.switch(active=())

    @property
    def adapter_bank(self) -> Bank | None:
        """The bank of adapters that rows can use besides the model's own; see `AdapterBank`."""
        return self.ia3_routing.bank

    def attach_adapter_bank(self, bank: Bank, targets: Iterable[Target], modules: Sequence[str]) -> None:
        """Let rows use the adapters of a bank. It replaces an earlier bank.

        Args:
            bank: the bank.
            targets: the modules that its adapters rescale.
            modules: the paths of modules that its adapters train in full.
        """
        wrap(self.model, self.ia3_routing, targets, modules)
        members = {**self.ia3_layers, **self.ia3_trained_modules}
        paths = [*(path for path, _, _ in bank.segments), *modules]
        self.ia3_routing.attach(bank, {path: members[path].slot for path in paths})
        take_out_idle(self.model, self.ia3_routing)

    # Switching.

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters."""
        return list(self.ia3_routing.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; a list unless it is exactly one."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; the vectors of several multiply. Only these become trainable.

        Args:
            adapter_name: a name or a list of names.
            inference_mode: keep them frozen.

        Raises:
            InputError: there is no such adapter, two of them train the same module in full (`modules_to_save`), or they
                act from different places (`acts_from`).
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self.require_adapters(names)
        check_copies(self.model, self.ia3_routing, names)
        self._ia3_require_one_kind(names)
        if self.ia3_routing.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.ia3_routing.switch(merged=())
            sync_weights(self.ia3_routing)
        self.ia3_routing.switch(active=names)
        self.set_requires_grad([name for name in self._ia3_trainable if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def _ia3_require_one_kind(self, names: Iterable[str]) -> None:
        names = list(names)
        if len({self.peft_config[name].acts_from for name in names}) > 1:
            raise InputError(
                f"Expected adapters that all act from the start of a text, or all from the question on (acts_from), found "
                f"both among {shown(names)}; choose those of one kind."
            )

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.require_adapters(names)
        if requires_grad and self._ia3_blocking:
            warnings.warn(
                f"{len(self._ia3_blocking)} modules are quantized so that they pass no gradients, such as "
                f"{self._ia3_blocking[0]!r}: vectors below them will not be trained. Quantize only weights, or load the "
                f"model without quantization.",
                stacklevel=3,
            )
            self._ia3_blocking = []
        for name in names:
            (self._ia3_trainable.add if requires_grad else self._ia3_trainable.discard)(name)
        self._ia3_sync_requires_grad(names)

    def _ia3_sync_requires_grad(self, names: Iterable[str]) -> None:
        """Set `requires_grad` of the adapters' parameters: true if the adapter is trainable and adapters are
        enabled."""
        for name in names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(self.ia3_routing.enabled and name in self._ia3_trainable)

    def enable_adapter_layers(self) -> None:
        """Enable all adapters again, merged ones too. Adapters that were trainable before are trainable again."""
        self._ia3_switch_all(True)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters, merged ones too: outputs equal the base model's, bit for bit. None is trainable."""
        self._ia3_switch_all(False)

    def _ia3_switch_all(self, enabled: bool) -> None:
        self.ia3_routing.switch(enabled=enabled)
        self._ia3_sync_requires_grad(self._ia3_trainable)
        sync_weights(self.ia3_routing)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters in a `with` block, and restore the previous state afterwards."""
        enabled = self.ia3_routing.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if enabled:
                self.enable_adapter_layers()

    # Composing.

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vector in each module is Σ wᵢ·ℓᵢ; an adapter that does not target a module counts as
        ones.

        Args:
            adapters: names of adapters.
            weights: a weight for each.
            adapter_name: the new adapter's name.

        Raises:
            InputError: a name is unknown or taken, the lists differ in length, a weight is not finite, two adapters rescale
                different sides of one module or act from different places (`acts_from`), or more than one trains a module
                of `modules_to_save`.
        """
        self._ia3_check_name(adapter_name)
        self.require_adapters(adapters)
        self._ia3_require_one_kind(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise InputError(
                f"Expected one weight for each adapter, found {len(adapters)} adapters and {len(weights)} weights."
            )
        if not all(map(math.isfinite, weights)):
            raise InputError(f"Expected weights that are finite numbers, found {shown(weights)}.")
        layers = {
            path: layer for path, layer in self.ia3_layers.items() if any(name in layer.held for name in adapters)
        }
        targets = []
        for path, layer in layers.items():
            vectors = [layer.held[name] for name in adapters if name in layer.held]
            sides = {vector.feedforward for vector in vectors}
            if len(sides) > 1:
                raise InputError(f"Cannot add adapters that rescale different sides (input, output) of {path!r}.")
            masks = [vector.mask for vector in vectors]
            mask = None if any(m is None for m in masks) else torch.stack(masks).any(0)  # type: ignore[arg-type]
            targets.append(Target(path, layer.base_layer, sides.pop(), mask))
        check_copies(self.model, self.ia3_routing, adapters)
        owners = {
            path: name for path, module in self.ia3_trained_modules.items() for name in adapters if name in module.held
        }

        modules = set(base_modules(self.model))
        if has_encoder(self.model) and self.peft_config[adapters[0]].acts_from == "question":
            modules -= outside_decoder(self.model)
        feedforward = {target.path for target in targets if target.feedforward}
        second = shortest_names(feedforward, modules - feedforward)
        first = shortest_names(set(layers) - feedforward, modules - set(layers))
        config = dataclasses.replace(
            self.peft_config[adapters[0]],
            target_modules=first | second,
            feedforward_modules=second,
            exclude_modules=None,
            modules_to_save=list(owners) or None,
        )
        insert(self.model, self.ia3_routing, adapter_name, targets, list(owners))
        self._ia3_keep_config(adapter_name, config)
        with torch.no_grad():
            for layer in layers.values():
                vector = layer.ia3_l[adapter_name]
                total = torch.zeros_like(vector)
                for name, weight in zip(adapters, weights, strict=True):
                    total += weight * (layer.vector(name) if name in layer.held else torch.ones_like(vector))
                vector.copy_(total)
            for path, owner in owners.items():
                module = self.ia3_trained_modules[path]
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[owner].state_dict())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        return look_through(self, super().__getattr__("model"), name)


def find_adapted(model: nn.Module) -> Adapted | None:
    """The `IA3Model` in a model: itself, or inside a `PeftModel`, a compiled model, or a wrapper for parallel
    training."""
    model = inside_wrappers(model)
    model = inside_wrappers(model._modules.get("base_model") or model)
    return model if isinstance(model, Adapted) else None


# PEFT's names for (IA)³ that are missing here, with the reason; docs/adapters.md lists them.
NOT_HERE = {
    "IA3Config.check_kwargs": "a hook for PEFT's own configs; it checks nothing for (IA)³",
    "IA3Model.inject_adapter": "use `add_adapter` for a model that has an adapter, `inject_adapter_in_model` for any other",
    "PeftModel.get_prompt": "for prompt learning",
    "PeftModel.get_prompt_embedding_to_save": "for prompt learning",
    "PeftMixedModel": "for adapters of several methods in one model; PEFT does not mix (IA)³",
    "shift_tokens_right": "for prompt learning; transformers' models have their own",
}


def look_through(owner: nn.Module, inner: Any, name: str) -> Any:
    """An attribute of the wrapped object. Raises `AttributeError` with the wrapper's name."""
    try:
        return getattr(inner, name)
    except AttributeError as error:
        why = next((f": {reason}" for there, reason in NOT_HERE.items() if there.endswith(f"Model.{name}")), "")
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}{why}") from error
