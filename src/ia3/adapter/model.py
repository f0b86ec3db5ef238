"""Put adapters into a model, switch, compose, merge, take them out: `IA3Model`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.modules.module import _IncompatibleKeys

from ia3.adapter import checkpoint, quantized
from ia3.adapter.architectures import READS_WEIGHTS, row_axis
from ia3.adapter.card import update_model_card, write_model_card
from ia3.adapter.config import IA3Config, PeftType
from ia3.adapter.layer import IA3Layer, TrainedModule
from ia3.adapter.mixing import check_generation, check_media
from ia3.adapter.routing import Routing
from ia3.adapter.rows import BASE, Rows, SameRows, row_count, uncompiled
from ia3.adapter.stored import StoredAdapter
from ia3.adapter.targets import (
    Target,
    base_modules,
    check_copies,
    inside_wrappers,
    resolve,
    shortest_names,
    unwrapped,
    wrappers,
)
from ia3.errors import InputError, shown, similar
from ia3.files import hub_arguments, upload

if TYPE_CHECKING:
    from ia3.bank import AdapterBank


class IA3Model(nn.Module):
    """A pretrained model with (IA)³ adapters in it (arXiv:2205.05638).

    The model is adapted in place: its keys', values' and feed-forwards' projections become `IA3Layer`s, everything
    else is frozen. Whatever `IA3Model` does not define (`config`, `device`, `layers`, …) is the wrapped model's.
    `get_peft_model` puts the façade of PEFT's scripts around it, `PeftModel`.

    Args:
        model: the base model.
        config: the first adapter's config, or several by name, or an empty dictionary (for a model whose adapters are
            all in a bank, or added later). `IA3Model(config, model)`, the order of PEFT's
            documentation, works too.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: create vectors without memory, to be filled by a checkpoint.
        autocast_adapter_dtype: float32 vectors; False: of their layers' dtype.

    Attributes:
        model: the base model, with adapters in it.
        peft_config: adapter name → `IA3Config`.
        adapter_folders: adapter name → what belongs beside it in a folder (task, recipe, …), where that is known.

    Raises:
        InputError: the config fits no module of the model; see `resolve_targets`.
    """

    # Names of ours that PEFT lacks contain "adapter" or "ia3", so that they hide none of the base model's.

    peft_type = PeftType.IA3
    prefix = "ia3_"
    tuner_layer_cls = IA3Layer
    uses_shared_state = False

    # To transformers.Trainer: a quantized base can be trained, for adapters are.
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
        """Take a base model over: what adapters add within is kept, and all else frozen, unless something fails."""
        self.model = model
        self.peft_config: dict[str, IA3Config] = {}
        self.adapter_folders: dict[str, StoredAdapter] = {}  # what belongs beside each adapter on disk
        self._ia3_trainable: set[str] = set()  # the adapters to freeze when others become active
        quantized.release_dequantized(model)
        quantized.keep_plain_layout(model)
        self._ia3_blocking = [
            path
            for path, module in base_modules(model).items()
            if quantized.is_quantized(module) and not quantized.passes_gradients(module)
        ]
        # Layers that an earlier adapter left in the model go on asking their own object: it becomes this model's too.
        asked = (module.routing for module in model.modules() if isinstance(module, (IA3Layer, TrainedModule)))
        self.ia3_routing = next(asked, None) or Routing()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            yield
        except BaseException:
            for name in list(self.peft_config):
                self.delete_adapter(name)
            raise
        for parameter in trainable:
            parameter.requires_grad_(False)

    # The pieces of the model that belong to adapters, by their path in the base model.

    @property
    def ia3_layers(self) -> dict[str, IA3Layer]:
        """The rescaled layers by their path in the base model."""
        return wrappers(self.model)[0]

    @property
    def ia3_trained_modules(self) -> dict[str, TrainedModule]:
        """The modules of `modules_to_save` by their path in the base model."""
        return wrappers(self.model)[1]

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """An adapter's parameters: its vectors, and its copies of `modules_to_save`."""
        for layer in self.ia3_routing.layers:
            if name in layer.ia3_l:
                yield layer.ia3_l[name]
        for module in self.ia3_routing.trained:
            if name in module.modules_to_save:
                yield from module.modules_to_save[name].parameters()

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
        """Add another adapter, not active and frozen. `set_adapter` makes it active.

        Args:
            adapter_name: a name that is not taken, without a dot.
            peft_config: see `IA3Config`; it is completed with what was resolved.
            low_cpu_mem_usage: create its vectors without memory, to be filled by a checkpoint.
            autocast_adapter_dtype: float32 vectors; False: of their layers' dtype.
            key_value_only: see `resolve_targets`.

        Raises:
            InputError: the name is taken or not allowed, or the config does not fit the model.
        """
        if isinstance(adapter_name, IA3Config):  # transformers' own mixin takes them in this order
            adapter_name, peft_config = peft_config or "default", adapter_name  # type: ignore[assignment]
        self._ia3_check_name(adapter_name)
        if not isinstance(peft_config, IA3Config):
            raise InputError(f"Expected an IA3Config, found a {type(peft_config).__name__}.")
        targets, kept = resolve(self.model, peft_config, key_value_only)
        self._ia3_insert(
            adapter_name,
            targets,
            kept,
            ones=peft_config.init_ia3_weights,
            meta=low_cpu_mem_usage,
            float32=autocast_adapter_dtype,
        )
        self.peft_config[adapter_name] = peft_config

    def _ia3_check_name(self, name: str) -> None:
        if name in self.peft_config:
            raise InputError(f"Adapter with name {name!r} already exists; choose another name or delete it.")
        if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
            raise InputError(
                f"Expected an adapter name that is not empty, has no dot and is no word of Python's dictionaries or "
                f"'__base__', found {name!r}."
            )
        if any(name in layer.ia3_l for layer in self.ia3_routing.layers):
            raise InputError(
                f"The model has an adapter {name!r} of an earlier IA3Model; unload that or choose another name."
            )

    def _ia3_insert(self, name: str, targets: list[Target], kept: list[str], **vector: bool) -> None:
        layers, trained = self._ia3_wrap(targets, kept)
        for layer, target in layers.items():
            layer.add(name, target.feedforward, rescaled=target.rescaled, **vector)
        for module in trained:
            module.add(name)
        self.ia3_routing.refresh()
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)

    def _ia3_wrap(self, targets: list[Target], kept: list[str]) -> tuple[dict[IA3Layer, Target], list[TrainedModule]]:
        """Put layers around the targets and the modules to train in full, where there are none yet; returns all."""
        layers: dict[nn.Module, IA3Layer] = {}  # a module at several paths is one module, with one vector
        found: dict[IA3Layer, Target] = {}
        for target in targets:
            if target.module not in layers:
                parent, place = self._ia3_place(target.path)
                layer = getattr(parent, place)
                if not isinstance(layer, IA3Layer):
                    weights_read = type(parent).__name__ in READS_WEIGHTS
                    layer = IA3Layer(target.module, self.ia3_routing, weights_read, row_axis(target.path, parent))
                layers[target.module] = layer
                found[layer] = target
        # At every path, named by the config or not: merging changes the module for all of them too.
        full = tuple(f"{path}." for path in (*kept, *self.ia3_trained_modules))
        for path, module in base_modules(self.model).items():
            if module in layers and not path.startswith(full):
                parent, place = self._ia3_place(path)
                setattr(parent, place, layers[module])
        trained = []
        for path in kept:
            parent, place = self._ia3_place(path)
            module = getattr(parent, place)
            if not isinstance(module, TrainedModule):
                module = TrainedModule(module, self.ia3_routing)
                setattr(parent, place, module)
            trained.append(module)
        return found, trained

    def _ia3_place(self, path: str) -> tuple[nn.Module, str]:
        """The module that owns the one at a path, and the name that it has there."""
        parent, _, name = path.rpartition(".")
        return unwrapped(self.model.get_submodule(parent)), name

    def _ia3_take_out(self, replacements: Mapping[IA3Layer | TrainedModule, nn.Module]) -> None:
        """Put plain modules where wrappers stand, at every path."""
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, (IA3Layer, TrainedModule)) and child in replacements:
                    setattr(parent, name, replacements[child])
        for wrapper in replacements:
            self.ia3_routing.leave(wrapper)
        self.ia3_routing.refresh()

    def _ia3_take_out_idle(self) -> None:
        """Take out the wrappers that no adapter needs any more, of the model's own or of the bank."""
        idle: list[IA3Layer | TrainedModule] = [layer for layer in self.ia3_routing.layers if not layer.ia3_l]
        idle += [module for module in self.ia3_routing.trained if not module.modules_to_save]
        replacements = {member: unwrapped(member) for member in idle if not self.ia3_routing.serves_bank(member)}
        if replacements:
            self._ia3_take_out(replacements)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was active, the first one that is left becomes active, with a warning, or none.

        Raises:
            InputError: there is no such adapter, or it is merged into the weights.
        """
        self.require_adapters([adapter_name])
        if adapter_name in self.ia3_routing.merged:
            raise InputError(f"Adapter {adapter_name!r} is merged into the weights; call unmerge_adapter() first.")
        self._ia3_remove(adapter_name)
        del self.peft_config[adapter_name]
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

    def _ia3_remove(self, name: str) -> None:
        """Take an adapter out of all layers, whichever `IA3Model` put it there."""
        for layer in self.ia3_routing.layers:
            if name in layer.ia3_l:
                layer.remove(name)
        for module in self.ia3_routing.trained:
            if name in module.modules_to_save:
                module.remove(name)
        self._ia3_take_out_idle()
        self.ia3_routing.refresh()

    def _ia3_replace_earlier(self, name: str) -> None:
        """Take out an adapter that an earlier `IA3Model` put into the same model, merged or not."""
        if name in self.ia3_routing.merged:
            self.ia3_routing.switch(merged=[each for each in self.ia3_routing.merged if each != name])
            self.ia3_routing.sync_weights()
        self._ia3_remove(name)

    @property
    def adapter_bank(self) -> AdapterBank | None:
        """The adapters that rows can have besides the model's own; see `AdapterBank`."""
        return self.ia3_routing.bank

    def _ia3_attach_bank(self, bank: AdapterBank) -> None:
        """Let rows have the adapters of a bank, in place of an earlier bank's."""
        self._ia3_wrap(bank.targets, bank.modules)
        members = {**self.ia3_layers, **self.ia3_trained_modules}
        self.ia3_routing.attach(bank, {entry.path: members[entry.path].slot for entry in bank.entries})
        self._ia3_take_out_idle()

    # Switching.

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in effect."""
        return list(self.ia3_routing.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter in effect; a list unless it is exactly one."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several, whose vectors multiply; they alone become trainable.

        Args:
            adapter_name: a name or a list of names.
            inference_mode: leave them frozen.

        Raises:
            InputError: there is no such adapter, or two of them train the same module in full (`modules_to_save`).
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self.require_adapters(names)
        check_copies(self.model, self.ia3_routing, names)
        if self.ia3_routing.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        self.ia3_routing.switch(active=names)
        self.set_requires_grad([name for name in self._ia3_trainable if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.require_adapters(names)
        if requires_grad and self._ia3_blocking:
            warnings.warn(
                f"{len(self._ia3_blocking)} modules are quantized in a way that passes no gradients on, such as "
                f"{self._ia3_blocking[0]!r}: vectors below them will not be trained. Load the model with its weights alone "
                f"quantized, or not quantized.",
                stacklevel=3,
            )
            self._ia3_blocking = []
        for name in names:
            (self._ia3_trainable.add if requires_grad else self._ia3_trainable.discard)(name)
        self._ia3_sync_requires_grad(names)

    def _ia3_sync_requires_grad(self, names: Iterable[str]) -> None:
        """Let parameters require gradients where their adapter is to be trained and adapters are on."""
        for name in names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(self.ia3_routing.enabled and name in self._ia3_trainable)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again, merged ones too, and let train those that did before."""
        self._ia3_switch_all(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, merged ones too: outputs equal the base model's, bit for bit. None is trainable."""
        self._ia3_switch_all(False)

    def _ia3_switch_all(self, enabled: bool) -> None:
        self.ia3_routing.switch(enabled=enabled)
        self._ia3_sync_requires_grad(self._ia3_trainable)
        _warn_of_rounding(self.ia3_routing.sync_weights())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within `with`, the base model. Afterwards everything is as it was before."""
        enabled = self.ia3_routing.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if enabled:
                self.enable_adapter_layers()

    # Composing.

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vector in each module is Σ wᵢ·ℓᵢ; an adapter that leaves a module out counts as ones.

        Args:
            adapters: names of adapters.
            weights: a weight for each.
            adapter_name: the new adapter's name.

        Raises:
            InputError: a name is unknown or taken, the lists differ in length, two adapters rescale different sides
                of one module, or more than one trains a module of `modules_to_save`.
        """
        self._ia3_check_name(adapter_name)
        self.require_adapters(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise InputError(
                f"Expected one weight for each adapter, found {len(adapters)} adapters and {len(weights)} weights."
            )
        layers = {
            path: layer for path, layer in self.ia3_layers.items() if any(name in layer.ia3_l for name in adapters)
        }
        targets = []
        for path, layer in layers.items():
            sides = {layer.feedforward[name] for name in adapters if name in layer.ia3_l}
            if len(sides) > 1:
                raise InputError(f"Cannot add adapters that rescale different sides (input, output) of {path!r}.")
            masks = [layer.masks.get(name) for name in adapters if name in layer.ia3_l]
            mask = None if any(m is None for m in masks) else torch.stack(masks).any(0)  # type: ignore[arg-type]
            targets.append(Target(path, layer.base_layer, sides.pop(), mask))
        check_copies(self.model, self.ia3_routing, adapters)
        owners = {
            path: name
            for path, module in self.ia3_trained_modules.items()
            for name in adapters
            if name in module.modules_to_save
        }

        modules = set(base_modules(self.model))
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
        self._ia3_insert(adapter_name, targets, list(owners))
        self.peft_config[adapter_name] = config
        with torch.no_grad():
            for layer in layers.values():
                vector = layer.ia3_l[adapter_name]
                total = torch.zeros_like(vector)
                for name, weight in zip(adapters, weights, strict=True):
                    total += weight * (layer.vector(name) if name in layer.ia3_l else torch.ones_like(vector))
                vector.copy_(total)
            for path, owner in owners.items():
                module = self.ia3_trained_modules[path]
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[owner].state_dict())

    # Merging and taking out.

    def _ia3_names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self.require_adapters(names)
        return names

    def _ia3_check_finite(self, names: Sequence[str]) -> None:
        """Raise when adapters would leave NaN or infinity in the weights, which stay as they are."""
        for path, layer in self.ia3_layers.items():
            layer.unmerge()  # to look at the adapters in the original weights
            broken = layer.broken(names)
            if broken:
                _warn_of_rounding(self.ia3_routing.sync_weights())
                raise InputError(
                    f"NaN or infinite values in the merged {broken} of {path!r}; the adapter {shown(names)} seems to "
                    f"be broken, and nothing was merged."
                )

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Multiply adapters into the base weights in place. While any are merged, exactly they are in effect.

        Args:
            adapter_names: which; None: the active ones.
            safe_merge: first make sure that no merged weight is NaN or infinite.

        Raises:
            InputError: an unknown name, several that train the same module in full, or (`safe_merge`) a broken adapter;
                the model stays as it was.
        """
        names = self._ia3_names_to_merge(adapter_names)
        new = [name for name in names if name not in self.ia3_routing.merged]
        if not new:
            if names:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        merged = (*self.ia3_routing.merged, *new)
        check_copies(self.model, self.ia3_routing, merged)
        if safe_merge:
            self._ia3_check_finite(merged)
        self.ia3_routing.switch(merged=merged)
        _warn_of_rounding(self.ia3_routing.sync_weights())

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit as they were before merging."""
        if not self.ia3_routing.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.ia3_routing.switch(merged=())
        _warn_of_rounding(self.ia3_routing.sync_weights())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model, without adapters, with vectors multiplied into its weights and biases.

        Args:
            progressbar: show one.
            safe_merge: first make sure that no merged weight is NaN or infinite; if one is, the model stays as it was.
            adapter_names: which adapters; None: the active ones.

        Raises:
            InputError: as of `merge_adapter`.
        """
        from tqdm.auto import tqdm

        names = list(dict.fromkeys([*self.ia3_routing.merged, *self._ia3_names_to_merge(adapter_names)]))
        check_copies(self.model, self.ia3_routing, names)
        if safe_merge:
            self._ia3_check_finite(names)
        replacements: dict[IA3Layer | TrainedModule, nn.Module] = {}
        errors = []
        with self._ia3_untying():
            for layer in tqdm(self.ia3_routing.layers, disable=not progressbar, desc="Merging"):
                errors.append(layer.merge(names, keep_originals=False))
                replacements[layer] = layer.base_layer
            for module in self.ia3_routing.trained:
                kept = next((name for name in names if name in module.modules_to_save), None)
                replacements[module] = module.original_module if kept is None else module.modules_to_save[kept]
            self._ia3_take_out(replacements)
        _warn_of_rounding(errors)
        return self._ia3_emptied()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        replacements: dict[IA3Layer | TrainedModule, nn.Module] = {}
        for layer in self.ia3_routing.layers:
            layer.unmerge()
            replacements[layer] = layer.base_layer
        for module in self.ia3_routing.trained:
            replacements[module] = module.original_module
        self._ia3_take_out(replacements)
        return self._ia3_emptied()

    @contextmanager
    def _ia3_untying(self) -> Iterator[None]:
        """Within, output and input embeddings may become different; then say so in the model's config, or a saved
        model would be tied again when it is loaded."""
        tied = _embeddings_are_one(self.model)
        yield
        if tied and not _embeddings_are_one(self.model):
            self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            warnings.warn(
                "The adapter changed one of two tied embeddings; the merged model has both, and tie_word_embeddings "
                "is now False in its config.",
                stacklevel=4,
            )

    def _ia3_emptied(self) -> nn.Module:
        self.peft_config.clear()
        self.adapter_folders.clear()
        self._ia3_trainable.clear()
        self.ia3_routing.attach(None, {})
        self.ia3_routing.switch(active=(), merged=())
        return self.model

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trainable, and how many there are."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Saving and loading.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | str | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Callable | None = None,
    ) -> None:
        """Write adapters, and only they, in PEFT's format. One that is not named "default" gets a subfolder.

        Args:
            save_directory: a folder; made when it is not there.
            safe_serialization: safetensors; False: `torch.save`.
            selected_adapters: which; None: all.
            save_embedding_layers: see `get_peft_model_state_dict`.
            is_main_process: False writes nothing (in distributed training only one process writes).
            state_dict: the model's state, when it has been gathered already.
            save_function: accelerate's, which scripts give; ignored, with a warning: a folder is written as a whole.

        Raises:
            InputError: an unknown name, or the path is a file.
        """
        if save_function is not None:
            warnings.warn("'save_function' is ignored: an adapter's folder is written as a whole.", stacklevel=2)
        if os.path.isfile(save_directory):
            raise InputError(f"Provided path ({save_directory}) should be a directory, not a file.")
        chosen = [selected_adapters] if isinstance(selected_adapters, str) else selected_adapters
        names = list(self.peft_config if chosen is None else chosen)
        self.require_adapters(names)
        if not names:
            raise InputError("Expected an adapter to save, found none in the model.")
        if not is_main_process:
            return
        for name in names:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name, safe_serialization, state_dict, save_embedding_layers)
        write_model_card(self, save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write a `README.md` that says what the adapter is, or complete the head of the folder's own."""
        update_model_card(self, output_dir)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload the adapters to a hub repository, which is made when it is not there. Returns the commit's address.

        Args:
            repo_id: owner/name.
            private: for a new repository.
            token: of the hub; None: the one that is logged in.
            **kwargs: `commit_message`, `revision`, `create_pr`, … as of `huggingface_hub.upload_folder`.
        """
        kwargs.setdefault("commit_message", "Upload (IA)³ adapter")
        return upload(self.save_pretrained, repo_id, private, token, **kwargs)

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
    ) -> IA3Model:
        """Put a saved adapter into a base model.

        Args:
            model: the base model; adapted in place.
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name in this model.
            is_trainable: go on training it; else it is frozen and the model is put into evaluation mode.
            config: use this one, not the saved one.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, **kwargs: see `load_adapter`.

        Raises:
            InputError: no adapter there, another method's, damaged, or for another model; the model stays as it was.
        """
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)
        with adapted._ia3_wrapping(model):
            checkpoint.load_adapter(
                adapted,
                model_id,
                adapter_name,
                is_trainable,
                config,
                low_cpu_mem_usage,
                autocast_adapter_dtype,
                key_mapping,
                **_loading_arguments(ephemeral_gpu_offload, kwargs),
            )
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter beside the others, not active; or refill the one of that name.

        Args:
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name in this model.
            is_trainable: make it trainable; else the model is put into evaluation mode.
            torch_device: ignored, with a warning: vectors lie where their layers do.
            autocast_adapter_dtype: float32 vectors; False: of their layers' dtype.
            ephemeral_gpu_offload: for LoRA; True is an error.
            low_cpu_mem_usage: create vectors without memory before they are filled.
            key_mapping: as of `load_peft_weights`.
            **kwargs: `ignore_mismatched_sizes` as of `set_peft_model_state_dict`, `subfolder`, and the hub's
                `revision`, `token`, `cache_dir`, ….

        Returns:
            `missing_keys` and `unexpected_keys`, which are empty: an adapter that does not fit is an error.

        Raises:
            InputError: see `from_pretrained`.
        """
        known = adapter_name in self.peft_config
        where = _loading_arguments(ephemeral_gpu_offload, {"torch_device": torch_device, **kwargs})
        result = checkpoint.load_adapter(
            self,
            model_id,
            adapter_name,
            is_trainable,
            None,
            low_cpu_mem_usage,
            autocast_adapter_dtype,
            key_mapping,
            **where,
        )
        if not known and is_trainable:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()
        return result

    # Being the wrapped model.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's forward pass.

        Args:
            *args: the wrapped model's.
            adapter_names: an adapter for each row of the batch, "__base__" for none; None: the active adapters for all.
            **kwargs: the wrapped model's.

        Raises:
            InputError: `adapter_names` is not a name a row, a name is unknown, adapters are merged, or the model mixes
                rows in a way that does not allow it.
        """
        before = self.ia3_routing.rows  # of a call that this one is made within
        if adapter_names is None and before is None:
            return self.model(*args, **kwargs)
        self.ia3_routing.rows = self._ia3_rows(adapter_names, args, kwargs)
        try:
            return self.model(*args, **kwargs)
        finally:
            self.ia3_routing.rows = before

    # Compiled code begins inside, where names have become tensors. (torch.compiler.disable(recursive=False) does this and
    # more: it refuses torch.export, and a compiled module with this one in it.)
    skip_code(forward.__code__)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generation. Args and errors: see `forward`."""
        check_generation(self, adapter_names or (), kwargs)
        before = self.ia3_routing.rows
        self.ia3_routing.rows = self._ia3_rows(adapter_names, args, kwargs)
        generate: Callable = self.model.generate  # type: ignore[assignment]
        try:
            return generate(*args, **kwargs)
        finally:
            self.ia3_routing.rows = before

    @contextmanager
    def adapter_rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within `with`, parts of the model that are called by themselves have an adapter for each row, as `forward`."""
        before = self.ia3_routing.rows
        self.ia3_routing.rows = self._ia3_rows(adapter_names, (), {})
        try:
            yield
        finally:
            self.ia3_routing.rows = before

    @uncompiled
    def _ia3_rows(self, names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rows | None:
        """Which adapter acts on which row of the batch that these arguments hold; None: the active ones on all."""
        if names is None:
            return None
        self.check_adapter_names(names)
        rows = row_count(args, kwargs)
        if not names or len(names) != (rows or len(names)):
            batch = "the rows" if rows is None else f"the {rows} rows"
            raise InputError(f"Expected adapter_names for {batch} of the batch, found {len(names)}.")
        if not self.ia3_routing.enabled:
            return None
        check_media(self, names, args, kwargs)
        if torch.is_grad_enabled() and self.model.training:
            for module in self.model.modules():
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not isinstance(function, SameRows):
                    module.__dict__["_gradient_checkpointing_func"] = SameRows(function, self.ia3_routing)
        return self.ia3_routing.gather(names, self.peft_config)

    def check_adapter_names(self, names: Sequence[str]) -> None:
        """Raise `InputError` unless a batch can have these adapters, one for each row."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"Expected adapter_names as a list of a name for each row, found {names!r}.")
        if self.ia3_routing.merged:
            raise InputError(
                f"Adapters are merged into the weights ({shown(self.ia3_routing.merged)}), so that all rows have them; call "
                f"unmerge_adapter() first."
            )
        bank = self.ia3_routing.bank
        for row, name in enumerate(names):
            if name not in self.peft_config and name != BASE and (bank is None or name not in bank):
                known = [*self.peft_config, *(() if bank is None else bank.names)]
                raise InputError(f"Row {row}: adapter {name!r} does not exist; {similar(name, known)}.")

    def get_base_model(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dictionary; one that says `model_type` "custom" when it has none."""
        config = getattr(model, "config", None)
        return config.to_dict() if hasattr(config, "to_dict") else dict(config or {"model_type": "custom"})  # type: ignore[union-attr]

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that adapters rescale."""
        return list(self.ia3_layers)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """None: (IA)³ rescales modules."""
        return []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: an adapter that multiplies is no sum of the weight and a product of low rank."""
        self.require_adapters([adapter_name])
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        return look_through(self, super().__getattr__("model"), name)


def find_adapted(model: nn.Module) -> IA3Model | None:
    """The `IA3Model` in a model: itself, or inside a `PeftModel`, a compiled model, or a wrapper for parallel training."""
    model = inside_wrappers(model)
    model = inside_wrappers(model._modules.get("base_model") or model)
    return model if isinstance(model, IA3Model) else None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trainable, and how many there are; of a packed weight of 4 bits all that it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # sharded by DeepSpeed, it is empty
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


# Names of PEFT's that concern (IA)³ and are not here, with the reason; docs/adapters.md lists them.
NOT_HERE = {
    "IA3Config.check_kwargs": "a hook for PEFT's own configs; it checks nothing for (IA)³",
    "IA3Model.inject_adapter": "`add_adapter` adds an adapter to a model that has one, `inject_adapter_in_model` to any other",
    "PeftModel.get_prompt": "for prompt learning",
    "PeftModel.get_prompt_embedding_to_save": "for prompt learning",
    "PeftMixedModel": "for adapters of several methods in one model; (IA)³ is not among those that PEFT mixes",
    "shift_tokens_right": "for prompt learning; transformers' models have their own",
}


def look_through(owner: nn.Module, inner: Any, name: str) -> Any:
    """An attribute of what a model wraps. Raises `AttributeError` in the name of the wrapper."""
    try:
        return getattr(inner, name)
    except AttributeError as error:
        why = next((f": {reason}" for there, reason in NOT_HERE.items() if there.endswith(f"Model.{name}")), "")
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}{why}") from error


# What PEFT takes to place a model on several devices; vectors lie where their layers do.
_PLACING = {
    *("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *("torch_device", "torch_dtype", "dtype"),
}


def _loading_arguments(ephemeral_gpu_offload: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `checkpoint.load_adapter` takes, of a PEFT script's keyword arguments.

    Raises:
        InputError: arguments that are not known, or are another method's.
    """
    if ephemeral_gpu_offload:
        raise InputError("Expected no ephemeral_gpu_offload, which is for LoRA; (IA)³ has nothing to offload.")
    given = {name: value for name, value in kwargs.items() if value is not None}
    if given.get("use_safetensors"):  # they come first in any case
        del given["use_safetensors"]
    placing = [name for name in given if name in _PLACING]
    if placing:
        warnings.warn(f"{shown(placing)}: ignored, for an adapter's vectors lie where their layers do.", stacklevel=3)
    own = {name: given.pop(name) for name in ("ignore_mismatched_sizes",) if name in given}
    return own | hub_arguments({name: value for name, value in given.items() if name not in placing})


def _embeddings_are_one(model: nn.Module) -> bool:
    """Whether a language model's input and output embeddings are the same parameter."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a transformers model, or one without such a thing
        return False
    return getattr(inputs, "weight", None) is not None and inputs.weight is getattr(outputs, "weight", None)


def _warn_of_rounding(errors: Sequence[float]) -> None:
    rounded = [error for error in errors if error > 0]
    if rounded:
        warnings.warn(
            f"{len(rounded)} of {len(errors)} quantized modules could not take their vector exactly and were quantized "
            f"again: their weights are off by {max(rounded):.2%} at most, {sum(rounded) / len(rounded):.2%} on average "
            f"(relative error of the rescaled weight).",
            stacklevel=4,
        )
