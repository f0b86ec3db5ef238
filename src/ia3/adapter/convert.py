"""Convert other (IA)³ checkpoints to adapter folders: T-Few's files, AdapterHub's folders, PEFT's pickled weights.

The conversion is exact: each vector goes where it has the same effect, or the source is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.card import card_of
from ia3.adapter.config import CONFIG_NAME, IA3Config, TaskType
from ia3.adapter.stored import CARD_NAME, StoredAdapter
from ia3.adapter.tensors import PREFIX, Tensors, check_vector, read_tensors, wrong_values
from ia3.errors import InputError, brief, shown
from ia3.files import TORCH_WEIGHTS_NAME, WEIGHTS_NAME, has_unfinished, is_unused, locate, read_json, reading

if TYPE_CHECKING:
    import torch

# File names of AdapterHub's `save_adapter`, with and without safetensors.
_HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HUB_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
}
# Tasks whose head AdapterHub saves with the adapter, like PEFT's `modules_to_save`.
_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


@dataclass
class Conversion:
    """A converted adapter: the source's format, the config, tensors by name in a checkpoint, and what was left out."""

    source: str
    config: IA3Config
    tensors: Tensors
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike, output: str | os.PathLike, base: str | None = None, **hub_kwargs: Any
) -> Conversion:
    """Convert the (IA)³ adapter in `source`, in any known format, to a folder that PEFT and this package read.

    Args:
        source: a T-Few `.pt` file; or a folder or hub id with an AdapterHub adapter or PEFT's `adapter_model.bin`.
        output: the folder to write, new or empty; or one that a killed run of this conversion left.
        base: the base model's name to record; None: the one that the source names, if any.
        hub_kwargs: `revision`, `token`, … for a hub id.

    Raises:
        InputError: the source is no complete (IA)³ adapter in a known format, or the output is in use. Nothing is
            written.
    """
    output = Path(output)
    used = InputError(f"Expected the output to be a new or empty folder, found {str(output)!r}; choose another.")
    if not is_unused(output) and not has_unfinished(output):
        raise used
    import torch

    with reading(source, "an (IA)³ adapter"):
        if os.path.isfile(source):
            converted = from_tfew(_read(source))
        elif Path(source).suffix in (".pt", ".pth", ".bin", ".safetensors"):
            raise InputError(f"Can't find the file {brief(str(source))}.")
        else:
            converted = _from_folder(source, **hub_kwargs)
        name = base or converted.config.base_model_name_or_path
        # Make a new config, so that the source's values are checked.
        converted.config = replace(converted.config, inference_mode=True, base_model_name_or_path=name)
        problem = wrong_values(converted.tensors, dict.fromkeys(converted.tensors, torch.float32))
        if problem:
            raise InputError(f"Expected vectors that are finite times alpha in {brief(str(source))}, found {problem}.")
    if not is_unused(output) and not _is_in(output, converted):
        raise used
    numbers = sum(tensor.numel() for tensor in converted.tensors.values())
    card = card_of(converted.config.base_model_name_or_path, numbers)
    StoredAdapter.write(output, converted.config, converted.tensors, {CARD_NAME: card.encode()})
    return converted


def _is_in(output: Path, converted: Conversion) -> bool:
    """Whether a folder already holds a converted adapter."""
    try:
        folder, tensors, _ = StoredAdapter.whole(output)
    except InputError:
        return False
    return folder.config.to_dict() == converted.config.to_dict() and (
        tensors.keys() == converted.tensors.keys()
        and all(tensor.equal(converted.tensors[name]) for name, tensor in tensors.items())
    )


def from_tfew(tensors: Mapping[str, torch.Tensor]) -> Conversion:
    """Convert an adapter of the T-Few authors' code for T5 and T0 (`LoRALinear` with rank 0 and scaling rank 1).

    Its `multi_lora_b`, (features, 1), multiplies a projection's output: keys, values, and the feed-forward's `wi_1`.

    Raises:
        InputError: other tensors (`lora_a`, `lora_b`, `multi_lora_a`) or another rank.
    """
    found = _matched(r"(.+)\.multi_lora_b", tensors, "T-Few (IA)³ file")
    config, adapter = _adapter({match[1]: _vector(name, tensors[name]) for name, match in found.items()})
    config.task_type = TaskType.SEQ_2_SEQ_LM
    return Conversion("T-Few", config, adapter)


def from_adapterhub(folder: str | os.PathLike, **hub_kwargs: Any) -> Conversion:
    """Convert an adapter of AdapterHub's `adapters` (and `adapter-transformers`): an `IA3Config` of `save_adapter`.

    Its `lora_B`, (features, 1), times `alpha` multiplies a projection's output, bias included: keys and values, and the
    feed-forward's first projection *before* the activation (Llama and Mistral: the second). This differs from a vector
    on the second projection's input, except for T5's `wi_1`, so the vector stays where it is.

    Raises:
        InputError: the adapter has another method, a gate, or other tensors; see also `locate`.
    """
    values = read_json(locate(folder, CONFIG_NAME, **hub_kwargs))
    method = values["config"] if isinstance(values.get("config"), dict) else {}
    expected = {"architecture": "lora", "composition_mode": "scale", "r": 1, "use_gating": False}
    found = {key: method.get(key) for key in expected}
    if {**found, "use_gating": bool(found["use_gating"])} != expected:
        raise InputError(
            f"Expected an AdapterHub (IA)³ adapter, {expected}, in {brief(str(folder))}, found {brief(found)}: another "
            f"method's, or with a gate that depends on the input."
        )
    # Before 1.1 alpha had no effect, and AdapterHub itself reads such adapters as if it were r (adapters#770).
    alpha = 1 if re.match(r"adapters\.(0|1\.0)\.", str(values.get("version"))) else method.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"Expected a number for alpha in {brief(str(folder))}, found {brief(alpha)}.")
    model_type, model_class = values.get("model_type"), str(values.get("model_class"))
    fused = (".c_attn", ".in_proj")
    if interface := _find(folder, "adapter_interface.json", **hub_kwargs):
        fused += (f".{read_json(interface).get('interface', {}).get('attn_qkv_proj')}",)

    file = _find(folder, *_HUB_WEIGHTS, **hub_kwargs) or locate(folder, _HUB_WEIGHTS[0], **hub_kwargs)
    tensors = _read(file)
    vectors: Tensors = {}
    pattern = rf"(.+)\.loras\.{re.escape(str(values.get('name')))}\.lora_B"
    for name, match in _matched(pattern, tensors, "AdapterHub (IA)³ adapter").items():
        path, vector = match[1], _vector(name, tensors[name])
        if model_type in ("t5", "mt5"):
            path = path.removeprefix("transformer.")  # T5AdapterModel has it, T5ForConditionalGeneration has not
        if path.endswith(fused):
            vector = _full_width(name, vector, method.get("attn_matrices"))
        vectors[path] = vector * float(alpha)
    # A short name would also match other layers, and BERT's `output.dense` also its attention's.
    config, tensors = _adapter(vectors, whole=bool(method.get("leave_out") or method.get("output_lora")))
    config.base_model_name_or_path = values.get("model_name") or None
    config.fan_in_fan_out = model_type == "gpt2"
    converted = Conversion("AdapterHub", config, tensors)
    if any(path.endswith(fused[1:]) for path in vectors):
        converted.notes.append(
            "AdapterHub trains with a random bias in a fused projection without one, and does not save it: outputs "
            "differ from AdapterHub's."
        )
    task = next((task for name, task in _TASKS.items() if model_class.endswith(name)), None)
    head = _find(folder, *_HUB_HEADS, **hub_kwargs)
    if head and task in _HEADS:
        modules = {f"{PREFIX}{name}": tensor for name, tensor in _read(head).items()}
        config.task_type, config.modules_to_save = task, sorted({name.split(".")[2] for name in modules})
        tensors.update(modules)
    elif task not in _HEADS:
        config.task_type = task
        if head:
            whose = "; a language model's is its base model's, unless it was trained" if task else ""
            converted.notes.append(f"The prediction head in {Path(head).name} is left out{whose}.")
    return converted


def _from_folder(folder: str | os.PathLike, **hub_kwargs: Any) -> Conversion:
    """Convert the adapter of a folder or hub id; its config decides the format."""
    values = read_json(locate(folder, CONFIG_NAME, **hub_kwargs))
    if "peft_type" not in values:
        return from_adapterhub(folder, **hub_kwargs)
    config = IA3Config.from_dict(values)
    if _find(folder, WEIGHTS_NAME, **hub_kwargs):
        raise InputError(f"{str(folder)!r} is a PEFT adapter in safetensors already; use it as it is.")
    tensors = _read(locate(folder, TORCH_WEIGHTS_NAME, **hub_kwargs))
    heads = "".join(rf"|(.+\.)?{re.escape(name)}\..+" for name in config.modules_to_save or [])
    for name in _matched(rf"{re.escape(PREFIX)}(.+\.ia3_l{heads})", tensors, "PEFT (IA)³ adapter"):
        if name.endswith(".ia3_l"):
            check_vector(name, tensors[name])
    return Conversion("PEFT", config, tensors)


def _adapter(vectors: Tensors, whole: bool = False) -> tuple[IA3Config, Tensors]:
    """The config and the checkpoint's tensors for vectors, (features, 1), on the outputs of modules.

    T5's gated feed-forward gets the paper's form: act(wi_0 x) · (l · wi_1 x) = l · (…), the input of `wo`.

    Args:
        vectors: module path → vector.
        whole: name modules by their whole path; otherwise by the part after the layer's number.
    """
    free = not any(path.endswith(".wo") for path in vectors)  # a module is rescaled on only one side
    moved = {path: re.sub(r"\.wi_1$", ".wo", path) if free else path for path in vectors}
    names = {path: path if whole else re.sub(r".*\.\d+\.", "", path) for path in moved.values()}
    inputs = {names[after] for path, after in moved.items() if after != path}
    config = IA3Config(target_modules=set(names.values()), feedforward_modules=inputs)
    return config, {f"{PREFIX}{moved[path]}.ia3_l": v if moved[path] == path else v.T for path, v in vectors.items()}


def _full_width(name: str, vector: torch.Tensor, parts: Any) -> torch.Tensor:
    """A vector for some thirds of a fused projection, with ones for the other thirds."""
    import torch

    given = [part for part in "qkv" if isinstance(parts, list) and part in parts]
    if not given or len(vector) % len(given):
        raise InputError(f"Expected numbers for {given} of a fused projection in {brief(name)}, found {len(vector)}.")
    values = dict(zip(given, vector.chunk(len(given)), strict=True))
    return torch.cat([values.get(part, torch.ones_like(values[given[0]])) for part in "qkv"])


def _vector(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim != 2 or tensor.shape[1] != 1 or not tensor.numel():
        raise InputError(
            f"Expected a vector of shape (features, 1), found {brief(name)} of shape {brief(tuple(tensor.shape))}."
        )
    return tensor


def _matched(pattern: str, tensors: Mapping[str, Any], kind: str) -> dict[str, re.Match[str]]:
    """The match of each name. Raises an error if names do not match or there are none."""
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    surplus = [name for name, match in matches.items() if not match]
    if surplus or not matches:
        raise InputError(
            f"Expected the tensors of a {kind}, found {shown(surplus, 3)} among {len(matches)}: is it another method's, "
            f"or a file without its folder?"
        )
    return {name: match for name, match in matches.items() if match}


def _find(source: str | os.PathLike, *names: str, **hub_kwargs: Any) -> str | None:
    """The first of these files that exists in the folder or hub repository."""
    for name in names:
        try:
            return locate(source, name, **hub_kwargs)
        except InputError:
            continue
    return None


def _read(file: str | os.PathLike) -> Tensors:
    """The float32 tensors of a file, by name. No code in the file is run.

    Raises:
        InputError: the file is cut short, or holds anything but finite floating-point tensors by name.
    """
    import torch

    tensors, _ = read_tensors(os.fspath(file))
    problem = wrong_values(tensors, dict.fromkeys(tensors, torch.float32))
    if problem:
        raise InputError(f"Expected finite floating-point numbers in {brief(str(file))}, found {problem}.")
    return {name: value.detach().float() for name, value in tensors.items()}
