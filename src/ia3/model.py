"""Put adapters into a model, switch, compose, merge, take them out: `IA3Model`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from ia3 import checkpoint, quantized
from ia3.architectures import READS_WEIGHTS, row_axis
from ia3.cards import write_model_card
from ia3.config import IA3Config, PeftType
from ia3.errors import InputError, shown, similar
from ia3.layers import IA3Layer, TrainedModule
from ia3.mixing import check_generation, check_media
from ia3.routing import Routing
from ia3.rows import BASE, Rows, SameRows, row_count, uncompiled
from ia3.targets import (
    TASK_HEADS,
    Target,
    base_modules,
    check_callable,
    check_copies,
    matches,
    resolve_targets,
    shortest_names,
    unwrapped,
    wrappers,
)

if TYPE_CHECKING:
    from ia3.bank import AdapterBank


class IA3Model(nn.Module):
    """A pretrained model with (IA)³ adapters in it (arXiv:2205.05638).

    The model is adapted in place: its keys', values' and feed-forwards' projections become `IA3Layer`s, everything
    else is frozen. Whatever `IA3Model` does not define (`generate`, `config`, `device`, …) is the wrapped model's.

    Args:
        model: the base model.
        config: the first adapter's config, or several by name, or an empty dictionary (for a model whose adapters are
            all in a bank, or added later). `IA3Model(config, model)`, the order of PEFT's
            documentation, works too.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: create vectors without memory, to be filled by a checkpoint.

    Attributes:
        model: the base model, with adapters in it.
        peft_config: adapter name → `IA3Config`.

    Raises:
        InputError: the config fits no module of the model; see `resolve_targets`.
    """

    peft_type = PeftType.IA3

    # To transformers.Trainer: a quantized base can be trained, for adapters are.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        model: nn.Module,
        config: IA3Config | Mapping[str, IA3Config] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(config, nn.Module):
            model, config = config, model  # type: ignore[assignment]
        if not isinstance(model, nn.Module) or config is None:
            raise InputError("Expected a model and an IA3Config: IA3Model(model, config).")
        configs = dict(config) if isinstance(config, Mapping) else {adapter_name: config}
        with self._wrapping(model):
            for name, one in configs.items():
                self.add_adapter(name, one, low_cpu_mem_usage=low_cpu_mem_usage)
        for first in list(configs)[:1]:
            self.set_adapter(first, inference_mode=configs[first].inference_mode)

    @contextmanager
    def _wrapping(self, model: nn.Module) -> Iterator[None]:
        """Take a base model over: what adapters add within is kept, and all else frozen, unless something fails."""
        self.model = model
        self.peft_config: dict[str, IA3Config] = {}
        self._trainable: set[str] = set()  # the adapters to freeze when others become active
        quantized.release_dequantized(model)
        quantized.keep_plain_layout(model)
        self._blocking = [
            path
            for path, module in base_modules(model).items()
            if quantized.is_quantized(module) and not quantized.passes_gradients(module)
        ]
        # Layers that an earlier adapter left in the model go on asking their own object: it becomes this model's too.
        asked = (module.routing for module in model.modules() if isinstance(module, (IA3Layer, TrainedModule)))
        self.routing = next(asked, None) or Routing()
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
    def layers(self) -> dict[str, IA3Layer]:
        """The rescaled layers by their path in the base model."""
        return wrappers(self.model)[0]

    @property
    def trained_modules(self) -> dict[str, TrainedModule]:
        """The modules of `modules_to_save` by their path in the base model."""
        return wrappers(self.model)[1]

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """An adapter's parameters: its vectors, and its copies of `modules_to_save`."""
        for layer in self.routing.layers:
            if name in layer.ia3_l:
                yield layer.ia3_l[name]
        for module in self.routing.trained:
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
        config: IA3Config,
        low_cpu_mem_usage: bool = False,
        key_value_only: bool | None = None,
    ) -> None:
        """Add another adapter, not active and frozen. `set_adapter` makes it active.

        Args:
            adapter_name: a name that is not taken, without a dot.
            config: see `IA3Config`; it is completed with what was resolved.
            low_cpu_mem_usage: create its vectors without memory, to be filled by a checkpoint.
            key_value_only: see `resolve_targets`.

        Raises:
            InputError: the name is taken or not allowed, or the config does not fit the model.
        """
        if isinstance(adapter_name, IA3Config):  # transformers' own mixin takes them in this order
            adapter_name, config = config or "default", adapter_name  # type: ignore[assignment]
        self._check_new_name(adapter_name)
        if not isinstance(config, IA3Config):
            raise InputError(f"Expected an IA3Config, found a {type(config).__name__}.")
        targets, kept = self.resolve(config, key_value_only)
        self._insert(adapter_name, targets, kept, config.init_ia3_weights, low_cpu_mem_usage)
        self.peft_config[adapter_name] = config

    def resolve(self, config: IA3Config, key_value_only: bool | None = None) -> tuple[list[Target], list[str]]:
        """What an adapter of this config rescales, and the paths of modules that it trains in full.

        Args and errors: see `add_adapter`.
        """
        heads = TASK_HEADS.get(config.task_type or "", ())
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None
        targets = resolve_targets(self.model, config, key_value_only)
        kept = self._resolve_modules_to_save(config)
        self._check_nesting([target.path for target in targets], kept)
        return targets, kept

    def _check_new_name(self, name: str) -> None:
        if name in self.peft_config:
            raise InputError(f"Adapter with name {name!r} already exists; choose another name or delete it.")
        if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
            raise InputError(
                f"Expected an adapter name that is not empty, has no dot and is no word of Python's dictionaries or "
                f"'__base__', found {name!r}."
            )
        if any(name in layer.ia3_l for layer in self.routing.layers):
            raise InputError(
                f"The model has an adapter {name!r} of an earlier IA3Model; unload that or choose another name."
            )

    def _resolve_modules_to_save(self, config: IA3Config) -> list[str]:
        names = config.modules_to_save
        if not names:
            return []
        modules = base_modules(self.model)
        chosen = [path for path in modules if matches(path, names)]
        unknown = [
            name
            for name in names
            if not any(name in heads for heads in TASK_HEADS.values())
            and not any(matches(path, [name]) for path in chosen)
        ]
        if unknown:
            raise InputError(
                f"No module is named {shown(unknown)}, as modules_to_save asks; the model's parts are "
                f"{shown([name for name, _ in self.model.named_children()], 12)}."
            )
        kept = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
        for path in kept:
            check_callable(path, modules[path])
        return kept

    def _check_nesting(self, targets: list[str], kept: list[str]) -> None:
        """Refuse an adapter on a part of a module that an adapter trains in full, or the reverse: copies would differ."""
        layers, trained = wrappers(self.model)
        outer = {*kept, *trained}
        nested = [(a, b) for a in sorted(outer) for b in sorted(outer) if a.startswith(f"{b}.")]
        if nested:
            a, b = nested[0]
            raise InputError(f"Cannot train {a!r} in full beside {b!r}, which it is a part of (modules_to_save).")
        inner = {*targets, *layers}
        nested = [(a, b) for a in sorted(inner) for b in sorted(outer) if f"{a}.".startswith(f"{b}.")]
        if nested:
            a, b = nested[0]
            raise InputError(
                f"Cannot rescale {a!r} while an adapter trains {b!r} in full (modules_to_save); exclude one."
            )

    def _insert(self, name: str, targets: list[Target], kept: list[str], ones: bool, meta: bool) -> None:
        layers, trained = self._wrap(targets, kept)
        for layer, target in layers.items():
            layer.add(name, target.feedforward, ones, target.rescaled, meta)
        for module in trained:
            module.add(name)
        self.routing.refresh()
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)

    def _wrap(self, targets: list[Target], kept: list[str]) -> tuple[dict[IA3Layer, Target], list[TrainedModule]]:
        """Put layers around the targets and the modules to train in full, where there are none yet; returns all."""
        layers: dict[nn.Module, IA3Layer] = {}  # a module at several paths is one module, with one vector
        found: dict[IA3Layer, Target] = {}
        for target in targets:
            if target.module not in layers:
                parent, place = self._place(target.path)
                layer = getattr(parent, place)
                if not isinstance(layer, IA3Layer):
                    weights_read = type(parent).__name__ in READS_WEIGHTS
                    layer = IA3Layer(target.module, self.routing, weights_read, row_axis(target.path, parent))
                layers[target.module] = layer
                found[layer] = target
        # At every path, named by the config or not: merging changes the module for all of them too.
        full = tuple(f"{path}." for path in (*kept, *self.trained_modules))
        for path, module in base_modules(self.model).items():
            if module in layers and not path.startswith(full):
                parent, place = self._place(path)
                setattr(parent, place, layers[module])
        trained = []
        for path in kept:
            parent, place = self._place(path)
            module = getattr(parent, place)
            if not isinstance(module, TrainedModule):
                module = TrainedModule(module, self.routing)
                setattr(parent, place, module)
            trained.append(module)
        return found, trained

    def _place(self, path: str) -> tuple[nn.Module, str]:
        """The module that owns the one at a path, and the name that it has there."""
        parent, _, name = path.rpartition(".")
        return unwrapped(self.model.get_submodule(parent)), name

    def _take_out(self, replacements: Mapping[IA3Layer | TrainedModule, nn.Module]) -> None:
        """Put plain modules where wrappers stand, at every path."""
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, (IA3Layer, TrainedModule)) and child in replacements:
                    setattr(parent, name, replacements[child])
        for wrapper in replacements:
            self.routing.leave(wrapper)
        self.routing.refresh()

    def _take_out_idle(self) -> None:
        """Take out the wrappers that no adapter needs any more, of the model's own or of the bank."""
        idle: list[IA3Layer | TrainedModule] = [layer for layer in self.routing.layers if not layer.ia3_l]
        idle += [module for module in self.routing.trained if not module.modules_to_save]
        replacements = {member: unwrapped(member) for member in idle if not self.routing.serves_bank(member)}
        if replacements:
            self._take_out(replacements)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was active, the first one that is left becomes active, with a warning, or none.

        Raises:
            InputError: there is no such adapter, or it is merged into the weights.
        """
        self.require_adapters([adapter_name])
        if adapter_name in self.routing.merged:
            raise InputError(f"Adapter {adapter_name!r} is merged into the weights; call unmerge_adapter() first.")
        for layer in self.routing.layers:
            if adapter_name in layer.ia3_l:
                layer.remove(adapter_name)
        for module in self.routing.trained:
            if adapter_name in module.modules_to_save:
                module.remove(adapter_name)
        self._take_out_idle()
        self.routing.refresh()
        del self.peft_config[adapter_name]
        self._trainable.discard(adapter_name)
        if adapter_name in self.routing.active:
            left = [name for name in self.routing.active if name != adapter_name] or list(self.peft_config)[:1]
            if left:
                warnings.warn(
                    f"Adapter {adapter_name!r} was active and is now deleted. Active now: {shown(left, 20)}.",
                    stacklevel=2,
                )
                self.set_adapter(left)
            else:
                self.routing.switch(active=())

    @property
    def bank(self) -> AdapterBank | None:
        """The adapters that rows can have besides the model's own; see `AdapterBank`."""
        return self.routing.bank

    def _attach_bank(self, bank: AdapterBank) -> None:
        """Let rows have the adapters of a bank, in place of an earlier bank's."""
        self._wrap(bank.targets, bank.modules)
        members = {**self.layers, **self.trained_modules}
        self.routing.attach(bank, {entry.path: members[entry.path].slot for entry in bank.entries})
        self._take_out_idle()

    # Switching.

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in effect."""
        return list(self.routing.active)

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
        check_copies(self.model, self.routing, names)
        if self.routing.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        self.routing.switch(active=names)
        self.set_requires_grad([name for name in self._trainable if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.require_adapters(names)
        if requires_grad and self._blocking:
            warnings.warn(
                f"{len(self._blocking)} modules are quantized in a way that passes no gradients on, such as "
                f"{self._blocking[0]!r}: vectors below them will not be trained. Load the model with its weights alone "
                f"quantized, or not quantized.",
                stacklevel=3,
            )
            self._blocking = []
        for name in names:
            (self._trainable.add if requires_grad else self._trainable.discard)(name)
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again, merged ones too."""
        self.routing.switch(enabled=True)
        _warn_of_rounding(self.routing.sync_weights())

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, merged ones too: outputs equal the base model's, bit for bit."""
        self.routing.switch(enabled=False)
        _warn_of_rounding(self.routing.sync_weights())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within `with`, the base model. Afterwards everything is as it was before."""
        enabled = self.routing.enabled
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
        self._check_new_name(adapter_name)
        self.require_adapters(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise InputError(
                f"Expected one weight for each adapter, found {len(adapters)} adapters and {len(weights)} weights."
            )
        layers = {path: layer for path, layer in self.layers.items() if any(name in layer.ia3_l for name in adapters)}
        targets = []
        for path, layer in layers.items():
            sides = {layer.feedforward[name] for name in adapters if name in layer.ia3_l}
            if len(sides) > 1:
                raise InputError(f"Cannot add adapters that rescale different sides (input, output) of {path!r}.")
            masks = [layer.masks.get(name) for name in adapters if name in layer.ia3_l]
            mask = None if any(m is None for m in masks) else torch.stack(masks).any(0)  # type: ignore[arg-type]
            targets.append(Target(path, layer.base_layer, sides.pop(), mask))
        check_copies(self.model, self.routing, adapters)
        owners = {
            path: name
            for path, module in self.trained_modules.items()
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
        self._insert(adapter_name, targets, list(owners), ones=True, meta=False)
        self.peft_config[adapter_name] = config
        with torch.no_grad():
            for layer in layers.values():
                vector = layer.ia3_l[adapter_name]
                total = torch.zeros_like(vector)
                for name, weight in zip(adapters, weights, strict=True):
                    total += weight * (layer.vector(name) if name in layer.ia3_l else torch.ones_like(vector))
                vector.copy_(total)
            for path, owner in owners.items():
                module = self.trained_modules[path]
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[owner].state_dict())

    # Merging and taking out.

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self.require_adapters(names)
        return names

    def _check_finite(self, names: Sequence[str]) -> None:
        """Raise when adapters would leave NaN or infinity in the weights, which stay as they are."""
        for path, layer in self.layers.items():
            layer.unmerge()  # to look at the adapters in the original weights
            broken = layer.broken(names)
            if broken:
                _warn_of_rounding(self.routing.sync_weights())
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
        names = self._names_to_merge(adapter_names)
        new = [name for name in names if name not in self.routing.merged]
        if not new:
            if names:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        merged = (*self.routing.merged, *new)
        check_copies(self.model, self.routing, merged)
        if safe_merge:
            self._check_finite(merged)
        self.routing.switch(merged=merged)
        _warn_of_rounding(self.routing.sync_weights())

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit as they were before merging."""
        if not self.routing.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.routing.switch(merged=())
        _warn_of_rounding(self.routing.sync_weights())

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, progressbar: bool = False
    ) -> nn.Module:
        """The base model, without adapters, with vectors multiplied into its weights and biases.

        Args:
            safe_merge: first make sure that no merged weight is NaN or infinite; if one is, the model stays as it was.
            adapter_names: which adapters; None: the active ones.
            progressbar: show one.

        Raises:
            InputError: as of `merge_adapter`.
        """
        from tqdm.auto import tqdm

        names = list(dict.fromkeys([*self.routing.merged, *self._names_to_merge(adapter_names)]))
        check_copies(self.model, self.routing, names)
        if safe_merge:
            self._check_finite(names)
        replacements: dict[IA3Layer | TrainedModule, nn.Module] = {}
        errors = []
        with self._untying():
            for layer in tqdm(self.routing.layers, disable=not progressbar, desc="Merging"):
                errors.append(layer.merge(names, keep_originals=False))
                replacements[layer] = layer.base_layer
            for module in self.routing.trained:
                kept = next((name for name in names if name in module.modules_to_save), None)
                replacements[module] = module.original_module if kept is None else module.modules_to_save[kept]
            self._take_out(replacements)
        _warn_of_rounding(errors)
        return self._emptied()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        replacements: dict[IA3Layer | TrainedModule, nn.Module] = {}
        for layer in self.routing.layers:
            layer.unmerge()
            replacements[layer] = layer.base_layer
        for module in self.routing.trained:
            replacements[module] = module.original_module
        self._take_out(replacements)
        return self._emptied()

    @contextmanager
    def _untying(self) -> Iterator[None]:
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

    def _emptied(self) -> nn.Module:
        self.peft_config.clear()
        self._trainable.clear()
        self.routing.attach(None, {})
        self.routing.switch(active=(), merged=())
        return self.model

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trainable, and how many there are."""
        trainable = total = 0
        for parameter in self.parameters():
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
        return trainable, total

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
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters, and only they, in PEFT's format. One that is not named "default" gets a subfolder.

        Args:
            save_directory: a folder; made when it is not there.
            safe_serialization: safetensors; False: `torch.save`.
            selected_adapters: which; None: all.
            is_main_process: False writes nothing (in distributed training only one process writes).
            state_dict: the model's state, when it has been gathered already.
            **kwargs: PEFT's other arguments, which mean nothing for (IA)³, are accepted and ignored.

        Raises:
            InputError: an unknown name, or the path is a file.
        """
        if os.path.isfile(save_directory):
            raise InputError(f"Provided path ({save_directory}) should be a directory, not a file.")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.require_adapters(names)
        if not names:
            raise InputError("Expected an adapter to save, found none in the model.")
        if not is_main_process:
            return
        for name in names:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name, safe_serialization, state_dict)
        write_model_card(self, save_directory)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload the adapters to a hub repository, which is made when it is not there. Returns the commit's address.

        Args:
            repo_id: owner/name.
            private: for a new repository.
            token: of the hub; None: the one that is logged in.
            **kwargs: `commit_message`, `revision`, `create_pr`, … as of `huggingface_hub.upload_folder`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kwargs.setdefault("commit_message", "Upload (IA)³ adapter")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: IA3Config | None = None,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> IA3Model:
        """Put a saved adapter into a base model.

        Args:
            model: the base model; adapted in place.
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name in this model.
            is_trainable: go on training it; else it is frozen and the model is put into evaluation mode.
            config: use this one, not the saved one.
            low_cpu_mem_usage: create vectors without memory before they are filled.
            **kwargs: `subfolder`, and the hub's `revision`, `token`, `cache_dir`, ….

        Raises:
            InputError: no adapter there, another method's, damaged, or for another model; the model stays as it was.
        """
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)
        with adapted._wrapping(model):
            checkpoint.load_adapter(
                adapted, model_id, adapter_name, is_trainable, config, low_cpu_mem_usage, **hub_only(kwargs)
            )
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a saved adapter beside the others, not active; or refill the one of that name.

        Args and errors: see `from_pretrained`.
        """
        known = adapter_name in self.peft_config
        checkpoint.load_adapter(
            self, model_id, adapter_name, is_trainable, low_cpu_mem_usage=low_cpu_mem_usage, **hub_only(kwargs)
        )
        if not known and is_trainable:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()

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
        before = self.routing.rows  # of a call that this one is made within
        if adapter_names is None and before is None:
            return self.model(*args, **kwargs)
        self.routing.rows = self._rows(adapter_names, args, kwargs)
        try:
            return self.model(*args, **kwargs)
        finally:
            self.routing.rows = before

    # Compiled code begins inside, where names have become tensors. (torch.compiler.disable(recursive=False) does this and
    # more: it refuses torch.export, and a compiled module with this one in it.)
    skip_code(forward.__code__)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generation. Args and errors: see `forward`."""
        check_generation(self, adapter_names or (), kwargs)
        before = self.routing.rows
        self.routing.rows = self._rows(adapter_names, args, kwargs)
        generate: Callable = self.model.generate  # type: ignore[assignment]
        try:
            return generate(*args, **kwargs)
        finally:
            self.routing.rows = before

    @contextmanager
    def rows_having(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within `with`, parts of the model that are called by themselves have an adapter for each row, as `forward`."""
        before = self.routing.rows
        self.routing.rows = self._rows(adapter_names, (), {})
        try:
            yield
        finally:
            self.routing.rows = before

    @uncompiled
    def _rows(self, names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rows | None:
        """Which adapter acts on which row of the batch that these arguments hold; None: the active ones on all."""
        if names is None:
            return None
        self.check_adapter_names(names)
        rows = row_count(args, kwargs)
        if not names or len(names) != (rows or len(names)):
            batch = "the rows" if rows is None else f"the {rows} rows"
            raise InputError(f"Expected adapter_names for {batch} of the batch, found {len(names)}.")
        if not self.routing.enabled:
            return None
        check_media(self, names, args, kwargs)
        if torch.is_grad_enabled() and self.model.training:
            for module in self.model.modules():
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not isinstance(function, SameRows):
                    module.__dict__["_gradient_checkpointing_func"] = SameRows(function, self.routing)
        return self.routing.gather(names, self.peft_config)

    def check_adapter_names(self, names: Sequence[str]) -> None:
        """Raise `InputError` unless a batch can have these adapters, one for each row."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise InputError(f"Expected adapter_names as a list of a name for each row, found {names!r}.")
        if self.routing.merged:
            raise InputError(
                f"Adapters are merged into the weights ({shown(self.routing.merged)}), so that all rows have them; call "
                f"unmerge_adapter() first."
            )
        bank = self.routing.bank
        for row, name in enumerate(names):
            if name not in self.peft_config and name != BASE and (bank is None or name not in bank):
                known = [*self.peft_config, *(() if bank is None else bank.names)]
                raise InputError(f"Row {row}: adapter {name!r} does not exist; {similar(name, known)}.")

    def get_base_model(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    @property
    def base_model(self) -> IA3Model:
        """This object: where PEFT nests two, there is one here, and `model.base_model.model` is the wrapped model."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)


def get_peft_model(
    model: nn.Module,
    peft_config: IA3Config,
    adapter_name: str = "default",
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    **kwargs: Any,
) -> IA3Model:
    """The model with a new (IA)³ adapter in it; see `IA3Model`. The config learns the base model's name.

    Args:
        model: the base model; adapted in place.
        peft_config: the adapter's config.
        adapter_name: its name.
        revision: the base model's revision, written into the config.
        low_cpu_mem_usage: see `IA3Model`.
        **kwargs: PEFT's other arguments, which mean nothing for (IA)³, are accepted and ignored.
    """
    if not isinstance(peft_config, IA3Config):
        raise InputError(f"Expected an IA3Config, found a {type(peft_config).__name__}.")
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    peft_config.revision = revision or peft_config.revision
    return IA3Model(model, peft_config, adapter_name, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: IA3Config, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Put an adapter into a model and return that model, not an `IA3Model` around it."""
    adapted = IA3Model(model, peft_config, adapter_name, low_cpu_mem_usage)
    model.peft_config = {**getattr(model, "peft_config", {}), **adapted.peft_config}  # type: ignore[assignment]
    return model


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


def hub_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a PEFT script's keyword arguments, those that say where the adapter is."""
    known = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}
    return {key: value for key, value in kwargs.items() if key in known}


PeftModel = IA3Model
