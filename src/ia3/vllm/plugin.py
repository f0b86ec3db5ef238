"""The vLLM plugin: (IA)³ adapters wherever vLLM takes LoRA adapters.

All uses of vLLM's internals are in this file and, for adapters that act from the question on, in `from_question`.

vLLM keeps the weights of adapters in slots, knows the slot of each token of a step, and wraps each linear layer. The
plugin adds a table to the wrapper for each rescaled side, with a row per slot and a last row of ones. One gather from
it gives the `tokens × width` factors. The rest (loading, eviction, scheduling, prefix caching) is vLLM's.

Nothing is imported from vLLM before vLLM loads the plugin (`register`, entry point `vllm.general_plugins`).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from ia3.adapter.config import CONFIG_NAME
from ia3.errors import InputError, reason, shown
from ia3.files import current
from ia3.vllm import from_question
from ia3.vllm.placing import Layer, Scales, place, read_config, read_vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ia3.adapter.config import IA3Config

OLDEST, NEWEST = "0.31", "0.33"
"""The versions of vLLM that are supported: these, those between, and the patch releases of all."""

ONLY = "ia3_only"
"""The key of vLLM's `additional_config` that makes an engine serve (IA)³ adapters only."""

# Architectures whose fused query/key/value projection has the base model's order in vLLM.
_PLAIN_ORDER = ("phi3",)

_logger = logging.getLogger("vllm.ia3")  # a child of vLLM's logger, to use its handlers and level


def register() -> None:
    """Add support for (IA)³ adapters to vLLM. In an unsupported version, warn once and refuse such adapters."""
    problem = unsupported()
    if problem is None:
        _install()
    else:
        _logger.warning("%s Everything else works as without ia3.", problem)
        _refuse(problem)


def unsupported() -> str | None:
    """Why the installed vLLM cannot serve (IA)³ adapters; None if it can."""
    import vllm
    from packaging.version import InvalidVersion, Version

    try:
        found = Version(vllm.__version__).release[:2]
    except InvalidVersion:  # built from a source without one
        found = ()
    if not Version(OLDEST).release <= found <= Version(NEWEST).release:
        return (
            f"ia3 serves (IA)³ adapters in vLLM {OLDEST} to {NEWEST}, found {vllm.__version__}: they are refused. Install "
            f"one of those, or the ia3 that supports this version."
        )
    try:
        missing = _missing()
    except (ImportError, AttributeError) as error:
        missing = [reason(error)]
    if missing:
        return (
            f"ia3 needs {shown(missing, 9)} inside vLLM, which {vllm.__version__} does not have: (IA)³ adapters are "
            f"refused. Install an unchanged vLLM {OLDEST} to {NEWEST}."
        )
    return None


def _missing() -> list[str]:
    """The names that this plugin needs and vLLM lacks."""
    from vllm.lora import model_manager, utils, worker_manager
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.model_executor.models.utils import WeightsMapper

    linear = ("create_lora_weights", "reset_lora", "set_mapping", "apply", "_apply_lora_to_output")
    manager = (
        "activate_adapter",
        "_add_adapter",
        "_create_lora_modules",
        "_init_punica_wrapper",
        "_set_adapter_mapping",
        "lora_slots",
    )
    needed = {
        utils: ("_all_lora_classes", "from_layer", "get_adapter_absolute_path"),
        worker_manager.WorkerLoRAManager: ("_load_adapter", "supports_tower_connector_lora"),
        worker_manager.LRUCacheWorkerLoRAManager: ("_manager_cls",),
        model_manager.LRUCacheLoRAModelManager: manager,
        BaseLinearLayerWithLoRA: linear,
        LogitsProcessorWithLoRA: ("create_lora_weights",),
        VocabParallelEmbeddingWithLoRA: ("create_lora_weights",),
        PunicaWrapperBase: ("token_lora_indices",),
        WeightsMapper: ("get_rename_mapper", "_map_name"),
    }
    return [
        f"{owner.__name__}.{name}"
        for each in (needed, from_question.needed())
        for owner, names in each.items()
        for name in names
        if not hasattr(owner, name)
    ]


def _refuse(problem: str) -> None:
    """Refuse an (IA)³ adapter with the reason, before vLLM fails on its config."""
    try:
        from vllm.lora.worker_manager import WorkerLoRAManager

        stock = WorkerLoRAManager._load_adapter
    except (ImportError, AttributeError):
        return

    def load(self: Any, lora_request: Any) -> Any:
        if os.path.isdir(lora_request.lora_path) and read_config(lora_request.lora_path) is not None:
            raise InputError(problem)
        return stock(self, lora_request)

    WorkerLoRAManager._load_adapter = load


class Routing:
    """The row of the layers' tables for each token of a step.

    On a CPU nothing is compiled and a step's adapters are known, so work that no token needs is left out. Elsewhere the
    forward pass may be traced once for all steps, so the two flags do not change.

    Attributes:
        rows: (tokens,) the row of each token; after the step's end, the last row, which holds ones.
        rescales: whether any token of the step has an (IA)³ adapter.
        lora: whether any has a LoRA adapter.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device | str, only: bool) -> None:
        self.identity = slots
        self.rows = torch.full((tokens,), slots, dtype=torch.long, device=device)
        self.rescales, self.lora = True, not only
        self.by_step = self.rows.device.type == "cpu"

    def update(self, slots: torch.Tensor, rescales: bool, lora: bool) -> None:
        """Set the slot of each token of the next step; negative for tokens without an adapter."""
        self.route(slots)
        if self.by_step:
            self.rescales, self.lora = rescales, lora

    def route(self, slots: torch.Tensor, texts: Sequence[slice] = ()) -> None:
        """Set the slots alone; no adapter acts on tokens before the question."""
        count = len(slots)
        self.rows[:count] = torch.where(slots < 0, self.identity, slots)
        self.rows[count:] = self.identity
        for text in texts:
            self.rows[text] = self.identity


class Rescaling:
    """A mixin for vLLM's wrappers of linear layers that rescales input and output.

    Attributes:
        input_scales: (slots + 1, inputs of this rank) in float32, the last row is ones; on a CPU None until a vector is
            set.
        output_scales: (slots + 1, outputs of this rank), the same for outputs.
        span: the outputs that any vector changes.
    """

    routing: Routing
    device: torch.device
    output_slices: tuple[int, ...]
    tp_size: int
    n_slices: int
    base_layer: Any
    slice_lora_a: Callable
    slice_lora_b: Callable

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        super().create_lora_weights(*_spare(self.device, max_loras), lora_config, model_config)  # type: ignore[misc]
        self.slots = max_loras
        self.input_scales: torch.Tensor | None = None
        self.output_scales: torch.Tensor | None = None
        self.span = slice(0, 0)
        if self.device.type != "cpu":
            self.input_scales = self._table(self._local_inputs())
            self.output_scales = self._table(sum(self.output_slices))
            self.span = slice(0, sum(self.output_slices))

    def _table(self, width: int) -> torch.Tensor:
        with torch.inference_mode(False):  # the first vector may be set inside a step, the next one outside
            return torch.ones(self.slots + 1, width, device=self.device)

    def _local_inputs(self) -> int:
        return getattr(self.base_layer, "input_size_per_partition", self.base_layer.input_size)

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        self.routing = punica_wrapper.ia3

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)  # type: ignore[misc]
        for table in (self.input_scales, self.output_scales):
            if table is not None:
                table[index] = 1

    def set_scales(self, index: int, scales: Scales) -> None:
        """Fill a slot, which holds ones, with this rank's share of an adapter's vectors for the layer."""
        if scales.inputs is not None:
            if self.input_scales is None:
                self.input_scales = self._table(self._local_inputs())
            self.input_scales[index] = self.sliced_inputs(scales.inputs)
        if any(part is not None for part in scales.outputs):
            row = self.sliced_outputs(scales.outputs)
            if self.output_scales is None:
                self.output_scales = self._table(len(row))
            self.output_scales[index] = row
            if self.device.type == "cpu":
                changed = torch.nonzero(row != 1).flatten().tolist() or [0]
                seen = [changed[0], changed[-1] + 1]
                if self.span.stop:
                    seen += [self.span.start, self.span.stop]
                self.span = slice(min(seen), max(seen))

    # A vector has the shape of a LoRA matrix of rank 1. So vLLM's slicing of LoRA matrices among tensor-parallel ranks
    # also slices vectors, including keys and values that several ranks share.

    def sliced_inputs(self, vector: torch.Tensor) -> torch.Tensor:
        """This rank's share of (1, inputs), flat."""
        return (self.slice_lora_a(vector) if self.tp_size > 1 else vector).flatten()

    def sliced_outputs(self, parts: list[torch.Tensor | None]) -> torch.Tensor:
        """This rank's share of the parts' (width, 1), flat, with ones for parts without a vector."""
        if self.n_slices == 1:
            (vector,) = parts
            return (self.slice_lora_b(vector) if self.tp_size > 1 else vector).flatten()  # type: ignore[union-attr]
        if len(parts) == 1:  # one in the checkpoint, several here
            parts = list(parts[0].split(list(self.base_layer.output_sizes)))  # type: ignore[union-attr]
        shares = self.slice_lora_b(parts) if self.tp_size > 1 else parts
        return torch.cat(
            [
                torch.ones(width) if share is None else share.flatten()
                for share, width in zip(shares, self.output_slices, strict=True)
            ]
        )

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.routing.rescales:
            return super().apply(x, bias)  # type: ignore[misc]
        if self.input_scales is not None:
            x = self._factors(self.input_scales, x).mul_(x).to(x.dtype)
        output = super().apply(x, bias)  # type: ignore[misc]
        if self.output_scales is not None:
            span = self.span
            output[..., span].mul_(self._factors(self.output_scales[:, span], output))
        return output

    def _factors(self, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Each token's row of the table, in the shape of the activations (…, tokens, width)."""
        if like.dim() == 2:
            return table.index_select(0, self.routing.rows[: like.shape[0]])
        shape = like.shape[:-1]
        return table.index_select(0, self.routing.rows[: shape.numel()]).view(*shape, -1)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not self.routing.lora:
            return output
        return super()._apply_lora_to_output(x, output)  # type: ignore[misc]


def _spare(device: torch.device, slots: int) -> tuple[int]:
    """The number of slots of LoRA matrices. vLLM's CPU code uses the last slot for index -1 (no adapter), so on CPUs
    there is an additional slot, which stays zero."""
    return (slots + 1 if device.type == "cpu" else slots,)


def _install() -> None:
    """Replace vLLM's classes by the plugin's. A second call changes nothing."""
    from vllm import envs
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora import utils, worker_manager
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.models.utils import PPMissingLayer

    if any(issubclass(each, Rescaling) for each in utils._all_lora_classes):
        return

    class IA3Adapter(LoRAModel):
        """An adapter in vLLM's caches."""

        def __init__(self, number: int, placed: dict[str, Scales], name: str, config: IA3Config) -> None:
            super().__init__(number, 1, {})
            self.placed, self.name = placed, name
            self.from_question = config.acts_from == "question"

    class Manager(LRUCacheLoRAModelManager):
        """A manager that also handles (IA)³ adapters and the layers that they rescale."""

        def __init__(self, *args: Any, lora_config: Any, vllm_config: Any, **kwargs: Any) -> None:
            extra = vllm_config.additional_config
            only = extra.get(ONLY, False) if isinstance(extra, dict) else False
            if not isinstance(only, bool):
                raise InputError(f"Expected true or false for {ONLY} in additional_config, found {only!r}.")
            self.ia3_only = only
            if only:
                lora_config.max_lora_rank = 1  # the matrices are not used, so make them as small as possible
            self.ia3_places = from_question.Places()
            self.ia3_texts: list[slice] = []
            super().__init__(*args, lora_config=lora_config, vllm_config=vllm_config, **kwargs)

        def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
            super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
            for wrapper in self.punica_wrapper_mapping.values():
                if not hasattr(wrapper, "ia3"):
                    tokens = len(wrapper._token_lora_indices)
                    wrapper.ia3 = Routing(tokens, self.lora_slots, self.device, self.ia3_only)

        def _create_lora_modules(self) -> None:
            if self.ia3_only:  # embeddings and the output layer have nothing to rescale
                left_out = getattr(self.model, "embedding_modules", None) or {}
                self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in left_out]
            super()._create_lora_modules()

        def ia3_layers(self) -> dict[str, Layer]:
            """The layers that can be rescaled, with their full width."""
            kind = getattr(self.model.config.get_text_config(), "model_type", None)
            found = {}
            for path, module in self.modules.items():
                if not isinstance(module, Rescaling):
                    continue
                base = module.base_layer
                parts = tuple(self.packed_modules.get(path, [path]))
                fused = isinstance(base, QKVParallelLinear)
                widths = [base.output_size]
                if fused:
                    keys = base.total_num_kv_heads * base.head_size
                    widths = [base.total_num_heads * base.head_size, keys, keys]
                elif len(parts) > 1:
                    widths = base.output_sizes
                if len(parts) == 1:
                    widths = [sum(widths)]
                elif len(parts) != len(widths):
                    continue  # a part of several slices; vectors for it are refused
                order = fused and len(parts) == 1 and kind not in _PLAIN_ORDER
                found[path] = Layer(
                    parts, tuple(widths), base.input_size, bool(base.bias is not None and base.skip_bias_add), order
                )
            return found

        def ia3_place(self, vectors: dict[str, torch.Tensor], name: str) -> dict[str, Scales]:
            """An adapter's vectors for each layer, from vectors by module path in the base model."""
            mapper = getattr(self.model, "hf_to_vllm_mapper", None)
            if mapper is not None:
                rename = mapper.get_rename_mapper()._map_name
                vectors = {rename(path) or path: vector for path, vector in vectors.items()}
            missing = [f"{path}." for path, module in self.model.named_modules() if isinstance(module, PPMissingLayer)]
            return place(vectors, self.ia3_layers(), name, lambda path: path.startswith(tuple(missing)))

        def _add_adapter(self, lora: LoRAModel) -> None:
            if isinstance(lora, IA3Adapter):  # there are no matrices to merge
                self._registered_adapters[lora.id] = lora
            else:
                super()._add_adapter(lora)

        def activate_adapter(self, lora_id: int) -> bool:
            activated = super().activate_adapter(lora_id)  # this resets the slot of each layer
            adapter = self._registered_adapters[lora_id]
            if activated and isinstance(adapter, IA3Adapter):
                slot = self.lora_index_to_id.index(lora_id)
                for path, scales in adapter.placed.items():
                    self.modules[path].set_scales(slot, scales)
            return activated

        def _set_adapter_mapping(self, mapping: Any) -> None:
            super()._set_adapter_mapping(mapping)
            found = [self._registered_adapters.cache.get(number) for number in set(mapping.index_mapping) if number > 0]
            rescales = any(isinstance(adapter, IA3Adapter) for adapter in found)
            lora = any(not isinstance(adapter, IA3Adapter) for adapter in found) and not self.ia3_only
            for wrapper in self.punica_wrapper_mapping.values():
                if wrapper.indices_len[0] is not None:
                    wrapper.ia3.update(wrapper.token_lora_indices, rescales, lora)

        def ia3_leave_out_texts(self, rows: Sequence[from_question.StepRow]) -> None:
            """Let no adapter act on the tokens of a step that stand before their request's question."""
            for request, number, _ in rows:
                adapter = self._registered_adapters.cache.get(number)
                if getattr(adapter, "from_question", False) != (request in self.ia3_places.told):
                    raise InputError(
                        f"Adapter {getattr(adapter, 'name', number)!r} acts from another place than its request says: its "
                        f"folder has changed, or this executor hands no places on; give new content a new name and folder."
                    )
            texts = self.ia3_places.texts(rows)
            if texts or self.ia3_texts:
                for wrapper in self.punica_wrapper_mapping.values():
                    if wrapper.indices_len[0] is not None:
                        wrapper.ia3.route(wrapper.token_lora_indices, texts)
            self.ia3_texts = texts

    def mended(stock: Callable) -> Callable:
        def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
            device = self.base_layer.weight.device if isinstance(self, VocabParallelEmbeddingWithLoRA) else self.device
            stock(self, *_spare(device, max_loras), lora_config, model_config)

        return create_lora_weights

    stock_load = worker_manager.WorkerLoRAManager._load_adapter

    def load_adapter(self: Any, lora_request: Any) -> LoRAModel:
        folder = utils.get_adapter_absolute_path(lora_request.lora_path)
        manager, name = self._adapter_manager, lora_request.lora_name
        if read_config(folder) is None:
            if not (current(folder) / CONFIG_NAME).is_file():
                raise LoRAAdapterNotFoundError(name, lora_request.lora_path)
            if manager.ia3_only:
                raise InputError(
                    f"Adapter {name!r} is no (IA)³ adapter, and this engine was started for those only ({ONLY}); start "
                    f"it without, to serve LoRA adapters too."
                )
            return stock_load(self, lora_request)
        if self.lora_config.fully_sharded_loras:
            raise InputError(
                f"Adapter {name!r} is an (IA)³ adapter, expected an engine without fully_sharded_loras; turn that off."
            )
        if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
            raise InputError(
                f"Adapter {name!r} is an (IA)³ adapter, expected an engine without VLLM_LORA_ENABLE_DUAL_STREAM; unset "
                f"that variable."
            )
        config, vectors = read_vectors(folder, name)
        if config.acts_from == "question" and self.supports_tower_connector_lora():
            raise InputError(
                f"Adapter {name!r} acts from the question on, expected an engine without enable_tower_connector_lora; turn "
                f"that off."
            )
        return IA3Adapter(lora_request.lora_int_id, manager.ia3_place(vectors, name), name, config)

    # Replace attributes of classes, which vLLM looks up at each use. Names in its modules are copied to other modules.
    utils._all_lora_classes = tuple(
        type(each.__name__, (Rescaling, each), {}) if issubclass(each, BaseLinearLayerWithLoRA) else each
        for each in utils._all_lora_classes
    )
    worker_manager.LRUCacheWorkerLoRAManager._manager_cls = Manager
    worker_manager.WorkerLoRAManager._load_adapter = load_adapter
    for each in (LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA):
        each.create_lora_weights = mended(each.create_lora_weights)
    from_question.install()
