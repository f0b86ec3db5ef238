"""Adapters that act from the question on, in vLLM: each request says where its question begins.

The place is `acts_from` in the request's `extra_args`. Three parts of vLLM have to know it:

- `InputProcessor`, which sees each request first: a request that lacks the place is refused there, alone.
- The keys of cached blocks: blocks before the question are the base model's, and have its key. From the question on
  the place is a part of the key.
- The workers: the scheduler says how far each request is, and the runner in which order its tokens stand in the step.

All names here are attributes of classes, where vLLM looks at each use, but for the function that makes the keys.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ia3.adapter.config import CONFIG_NAME
from ia3.errors import InputError, brief
from ia3.files import current
from ia3.vllm.placing import read_config

PLACE = "acts_from"
"""The key of the place in a request's `extra_args`."""


def needed() -> dict[Any, tuple[str, ...]]:
    """The names inside vLLM that this builds on, by their owner."""
    import vllm.exceptions
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return {
        vllm.exceptions: ("VLLMValidationError",),
        InputProcessor: ("process_inputs",),
        kv_cache_utils: ("generate_block_hash_extra_keys",),
        WorkerWrapperBase: ("execute_model",),
        InputBatch: ("make_lora_inputs", "req_ids"),
        LoraState: ("make_lora_inputs",),
        WorkerLoRAManager: ("set_active_adapters",),
    }


def acts_from_question(request: Any) -> bool:
    """Whether the adapter of a `LoRARequest` acts from the question on. It is looked up once, like the adapter."""
    try:
        return _in_folder(request.lora_int_id, request.lora_name, request.lora_path)
    except FileNotFoundError:  # vLLM says so when it wants to read the adapter
        return False


@functools.lru_cache(maxsize=1 << 16)
def _in_folder(number: int, name: str, path: str) -> bool:
    from vllm.lora.utils import get_adapter_absolute_path

    folder = get_adapter_absolute_path(path)
    config = read_config(folder)
    if config is None and not (current(folder) / CONFIG_NAME).is_file():
        raise FileNotFoundError
    return config is not None and config.acts_from == "question"


def place_of(sampling: Any) -> int | None:
    """The place that a request's `SamplingParams` hold; None for those that hold none, or of a request without them."""
    return (getattr(sampling, "extra_args", None) or {}).get(PLACE)


def check_request(request: Any) -> None:
    """Refuse an `EngineCoreRequest` whose adapter needs a place and gets none; take the place from all others.

    Raises:
        InputError: the place is missing, or none in the prompt; or the request is of a kind that has no place.
    """
    adapter, sampling = request.lora_request, request.sampling_params
    place = place_of(sampling)
    if adapter is None or not acts_from_question(adapter):
        if place is not None:
            sampling.extra_args = {key: value for key, value in sampling.extra_args.items() if key != PLACE}
        return
    owner = f"Adapter {adapter.lora_name!r}"
    if sampling is None or request.resumable:
        raise InputError(
            "acts from the question on, expected a request for text behind a whole prompt; use an adapter that acts from "
            "the start for embeddings and prompts that come in parts",
            owner=owner,
        )
    tokens = len(request.prompt_token_ids if request.prompt_embeds is None else request.prompt_embeds)
    if place is None:
        raise InputError(
            f"acts from the question on, expected the number of prompt tokens before it, found none; give it as "
            f"extra_args={{{PLACE!r}: n}} of SamplingParams (vllm_xargs over HTTP)",
            owner=owner,
        )
    if type(place) is not int or not 0 <= place <= tokens:
        raise InputError(
            f"acts from the question on, expected {PLACE} from 0 to the {tokens} tokens of the prompt, found "
            f"{brief(place)}",
            owner=owner,
        )


def block_keys(keys: tuple[Any, ...] | None, place: int, end: int) -> tuple[Any, ...] | None:
    """What tells a block of tokens apart from others with the same tokens, given vLLM's keys of it.

    Args:
        keys: vLLM's, with ("lora", name, path) among them.
        place: where the question of the block's request begins.
        end: the place behind the block's last token.
    """
    if end <= place:
        return tuple(key for key in keys or () if key[0] != "lora") or None
    return tuple((*key, place) if key[0] == "lora" else key for key in keys or ()) or None


class StepAdapters(set):
    """The adapters of a step, as vLLM hands them about.

    Attributes:
        rows: the step's requests for text, in the order of their tokens.
    """

    def __init__(self, adapters: Iterable[Any], numbers: Sequence[int], ids: Iterable[str], counts: Iterable[int]):
        super().__init__(adapters)
        self.rows: list[StepRow] = []
        first = 0
        for name, count in zip(ids, map(int, counts), strict=True):
            self.rows.append(StepRow(name, int(numbers[first]) if count else 0, slice(first, first + count)))
            first += count


class StepRow(NamedTuple):
    """A request's part in a step.

    Attributes:
        request: its id.
        adapter: its adapter's number; 0: it has none.
        tokens: where its tokens stand.
    """

    request: str
    adapter: int
    tokens: slice


class Places:
    """Where a worker's requests begin their questions, and how far each is.

    Attributes:
        told: the places, by the request's id.
    """

    def __init__(self) -> None:
        self.told: dict[str, int] = {}
        self._read: dict[str, int] = {}

    def note(self, step: Any) -> None:
        """Take over what the scheduler says about the next step (its `SchedulerOutput`)."""
        for name in step.finished_req_ids:
            self.told.pop(name, None)
        for new in step.scheduled_new_reqs:
            place = place_of(new.sampling_params)
            if place is not None:
                self.told[new.req_id] = place
        self._read = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        known = step.scheduled_cached_reqs
        self._read.update(zip(known.req_ids, known.num_computed_tokens, strict=True))

    def texts(self, rows: Iterable[StepRow]) -> list[slice]:
        """The tokens of the step that stand before their request's question."""
        found = []
        for request, _, tokens in rows:
            before = self.told.get(request, 0) - self._read.get(request, 0)
            if before > 0:
                found.append(slice(tokens.start, min(tokens.stop, tokens.start + before)))
        return found


def install() -> None:
    """Put this where vLLM looks for its own. The plugin does it once, and makes the manager that `ia3_places` is of."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    process, keys_of = InputProcessor.process_inputs, kv_cache_utils.generate_block_hash_extra_keys
    execute, activate = WorkerWrapperBase.execute_model, WorkerLoRAManager.set_active_adapters
    of_batch, of_state = InputBatch.make_lora_inputs, LoraState.make_lora_inputs

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        try:
            check_request(request)
        except InputError as error:  # vLLM hides others' errors from who asks
            raise VLLMValidationError(str(error)) from error
        return request

    def generate_block_hash_extra_keys(request: Any, start: int, end: int, image: int) -> Any:
        keys, image = keys_of(request, start, end, image)
        place = None if request.lora_request is None else place_of(request.sampling_params)
        return keys if place is None else block_keys(keys, place, end), image

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        manager = getattr(self.worker.model_runner, "lora_manager", None)
        if manager is not None:
            manager._adapter_manager.ia3_places.note(scheduler_output)
        return execute(self, scheduler_output)

    def batch_inputs(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        prompts, tokens, adapters = of_batch(self, num_scheduled_tokens, num_sampled_tokens)
        return prompts, tokens, StepAdapters(adapters, tokens, self.req_ids, num_scheduled_tokens)

    def state_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        prompts, tokens, adapters = of_state(self, req_ids, idx_mapping, num_scheduled_tokens)
        return prompts, tokens, StepAdapters(adapters, tokens, req_ids, num_scheduled_tokens)

    def set_active_adapters(self: Any, requests: Any, mapping: Any) -> None:
        activate(self, requests, mapping)
        if isinstance(requests, StepAdapters):
            self._adapter_manager.ia3_leave_out_texts(requests.rows)

    InputProcessor.process_inputs = process_inputs
    WorkerWrapperBase.execute_model = execute_model
    InputBatch.make_lora_inputs, LoraState.make_lora_inputs = batch_inputs, state_inputs
    WorkerLoRAManager.set_active_adapters = set_active_adapters
    for name, module in list(sys.modules.items()):  # those that have copied its name
        if name.startswith("vllm.") and vars(module).get("generate_block_hash_extra_keys") is keys_of:
            vars(module)["generate_block_hash_extra_keys"] = generate_block_hash_extra_keys
