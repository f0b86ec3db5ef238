"""Other people's (IA)³ checkpoints as adapter folders: T-Few's files, AdapterHub's folders, PEFT's pickled weights.

Nothing is approximated: each vector lands where it has the same effect, or the source is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.cards import write_card
from ia3.checkpoint import PREFIX, TORCH_WEIGHTS_NAME, WEIGHTS_NAME, Tensors
from ia3.config import CONFIG_NAME, IA3Config, TaskType
from ia3.errors import InputError, shown
from ia3.files import locate, replacing

if TYPE_CHECKING:
    import torch

# AdapterHub's `save_adapter`, with and without safetensors.
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
# The heads that these tasks train are modules of the transformers class, and small.
_HEAD_TASKS = {TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS}


@dataclass
class Conversion:
    """A converted adapter: where it came from, its config, its tensors by their names in a checkpoint, and a line for
    everything in the source that is not part of it."""

    source: str
    config: IA3Config
    tensors: Tensors
    notes: list[str] = field(default_factory=list)


def convert(source: str | os.PathLike, output: str | os.PathLike, base: str | None = None, **hub: Any) -> Conversion:
    """Write the (IA)³ adapter in `source`, of whatever kind, as a folder that PEFT and this package read.

    Args:
        source: a T-Few `.pt` file; or a folder or hub id with an AdapterHub adapter or PEFT's `adapter_model.bin`.
        output: the folder to write, new or empty.
        base: the base model's name to record; None: the one that the source names, if it does.
        hub: `revision`, `token`, … for a hub id.

    Raises:
        InputError: the source is no whole (IA)³ adapter of a known kind, or the output is in use. Nothing is written.
    """
    output = Path(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"Expected the output to be a new or empty folder, found {str(output)!r}; choose another.")
    converted = from_tfew(_read(source)) if Path(source).is_file() else _from_folder(source, **hub)
    converted.config.inference_mode = True
    converted.config.base_model_name_or_path = base or converted.config.base_model_name_or_path
    _write(converted, output)
    return converted


def from_tfew(tensors: Mapping[str, torch.Tensor]) -> Conversion:
    """The adapter of the T-Few authors' code (`src/models/lora.py`, rank 0 and scaling rank 1) for T5 and T0.

    There `multi_lora_b`, (features, 1), multiplies a projection's output and `multi_lora_a`, (1, features), its input.

    Raises:
        InputError: other tensors, another rank, or both sides of one projection.
    """
    sides = _matched(r"(?P<path>.+)\.multi_lora_(?P<side>[ab])", tensors, "T-Few (IA)³ file")
    vectors: Tensors = {}
    for name, match in sides.items():
        if match["path"] in vectors:
            raise InputError(
                f"Expected one vector a projection, found two for {match['path']!r} (multi_lora_a and multi_lora_b): "
                f"(IA)³ rescales one side."
            )
        vectors[match["path"]] = _vector(name, tensors[name], column=match["side"] == "b")
    config, tensors = _adapter(_before_wo(vectors))
    config.task_type = TaskType.SEQ_2_SEQ_LM
    return Conversion("T-Few", config, tensors)


def from_adapterhub(folder: str | os.PathLike, **hub: Any) -> Conversion:
    """The adapter of AdapterHub's `adapters` (and `adapter-transformers`): an `IA3Config` saved by `save_adapter`.

    There `lora_B`, (features, 1), times `alpha` multiplies a projection's output, bias included: keys and values, and
    the feed-forward's first projection *before* the activation (Llama and Mistral: the second). That is no vector on
    the second's input, except for T5's `wi_1`, so it stays where it is.

    Raises:
        InputError: another method, a gate, tensors that are no such vectors; and see `locate`.
    """
    values = _read_json(locate(folder, CONFIG_NAME, **hub))
    method = values["config"] if isinstance(values.get("config"), dict) else {}
    if (method.get("architecture"), method.get("composition_mode"), method.get("r")) != ("lora", "scale", 1):
        raise InputError(
            f"Expected an AdapterHub (IA)³ adapter (architecture 'lora', composition_mode 'scale', r 1) in "
            f"{str(folder)!r}, found {method.get('architecture')!r}, {method.get('composition_mode')!r}, "
            f"{method.get('r')!r}: this is another method's."
        )
    if method.get("use_gating"):
        raise InputError(f"Expected fixed vectors in {str(folder)!r}, found use_gating: a gate that depends on the input.")
    # Before 1.1 alpha had no effect, and AdapterHub itself reads such adapters as if it were r (adapters#770).
    old = re.match(r"adapters\.(0|1\.0)\.", str(values.get("version")))
    alpha = 1 if old else method.get("alpha", 1)
    model_type, model_class = values.get("model_type"), str(values.get("model_class"))
    fused = ["c_attn", "in_proj"]
    if interface := _find(folder, "adapter_interface.json", **hub):
        fused.append(str(_read_json(interface).get("interface", {}).get("attn_qkv_proj")))

    file = _find(folder, *_HUB_WEIGHTS, **hub) or locate(folder, _HUB_WEIGHTS[0], **hub)
    tensors = _read(file)
    vectors: Tensors = {}
    for name, match in _matched(r"(?P<path>.+)\.loras\.[^.]+\.lora_B", tensors, "AdapterHub (IA)³ adapter").items():
        path, vector = match["path"], _vector(name, tensors[name])
        if model_type in ("t5", "mt5"):
            path = path.removeprefix("transformer.")  # of AdapterHub's own model class, which transformers has not
        if path.endswith(tuple(f".{name}" for name in fused)):
            vector = _full_width(name, vector, method.get("attn_matrices", []))
        vectors[path] = vector * alpha
    # A name in every layer fits other layers too, and BERT's `output.dense` also its attention's.
    config, tensors = _adapter(_before_wo(vectors), whole=bool(method.get("leave_out") or method.get("output_lora")))
    config.base_model_name_or_path = values.get("model_name") or None
    config.fan_in_fan_out = model_type == "gpt2"
    task = next((task for name, task in _TASKS.items() if model_class.endswith(name)), None)
    converted = Conversion("AdapterHub", config, tensors)
    head = _find(folder, *_HUB_HEADS, **hub)
    if task not in _HEAD_TASKS:
        config.task_type = task
    elif head:
        modules = {f"{PREFIX}{name}": tensor for name, tensor in _read(head).items()}
        config.task_type, config.modules_to_save = task, sorted({name.split(".")[2] for name in modules})
        tensors.update(modules)
        head = None
    if head:
        converted.notes.append(f"Not converted: the prediction head in {Path(head).name}; only its vectors are.")
    return converted


def _from_folder(folder: str | os.PathLike, **hub: Any) -> Conversion:
    """The adapter of a folder or hub id, told by its config."""
    values = _read_json(locate(folder, CONFIG_NAME, **hub))
    if "peft_type" not in values:
        return from_adapterhub(folder, **hub)
    config = IA3Config.from_dict(values)
    if _find(folder, WEIGHTS_NAME, **hub):
        raise InputError(f"{str(folder)!r} is a PEFT adapter in safetensors already; use it as it is.")
    tensors = _read(locate(folder, TORCH_WEIGHTS_NAME, **hub))
    trained = [*(config.modules_to_save or []), *(["classifier", "score"] if config.task_type in _HEAD_TASKS else [])]
    heads = "".join(rf"|.*\.{re.escape(name)}\..+" for name in trained)
    for name in _matched(rf"{re.escape(PREFIX)}(.+\.ia3_l{heads})", tensors, "PEFT (IA)³ adapter"):
        if name.endswith(".ia3_l") and max(tensors[name].shape, default=0) != tensors[name].numel():
            raise InputError(f"Expected a vector, found {name!r} of shape {tuple(tensors[name].shape)}.")
    return Conversion("PEFT", config, tensors)


def _before_wo(vectors: Tensors) -> Tensors:
    """The paper's form of T5's gated feed-forward: act(wi_0 x) · (l · wi_1 x) = l · (…), the input of `wo`."""
    moved = {}
    for path, vector in vectors.items():
        after = re.sub(r"\.wi_1$", ".wo", path)
        moves = after != path and after not in vectors and vector.shape[1] == 1
        moved[after if moves else path] = vector.T if moves else vector
    return moved


def _adapter(vectors: Tensors, whole: bool = False) -> tuple[IA3Config, Tensors]:
    """The config and the checkpoint's tensors of vectors by path, (features, 1) on the output, (1, features) on the
    input; modules named by their whole path, or by what follows the layer's number."""

    def names(column: bool, whole: bool) -> set[str]:
        paths = [path for path, vector in vectors.items() if (vector.shape[1] == 1) is column]
        return {path if whole else re.sub(r".*\.\d+\.", "", path) for path in paths}

    whole = whole or bool(names(True, whole) & names(False, whole))
    inputs = names(False, whole)
    config = IA3Config(target_modules=names(True, whole) | inputs, feedforward_modules=inputs)
    return config, {f"{PREFIX}{path}.ia3_l": vector for path, vector in vectors.items()}


def _full_width(name: str, vector: torch.Tensor, parts: list[str]) -> torch.Tensor:
    """A vector for some thirds of a fused projection, with ones for the others."""
    import torch

    width, surplus = divmod(len(vector), max(1, len({"q", "k", "v"} & set(parts))))
    if surplus or not {"q", "k", "v"} & set(parts):
        raise InputError(f"Expected equal parts for {parts} of a fused projection in {name!r}, found {len(vector)} numbers.")
    given = iter(vector.split(width))
    return torch.cat([next(given) if part in parts else torch.ones_like(vector[:width]) for part in "qkv"])


def _vector(name: str, tensor: torch.Tensor, column: bool = True) -> torch.Tensor:
    """A tensor as (features, 1), or (1, features) where it is no column."""
    if tensor.ndim != 2 or tensor.shape[1 if column else 0] != 1 or not tensor.numel():
        expected = "(features, 1)" if column else "(1, features)"
        raise InputError(f"Expected a vector of shape {expected}, found {name!r} of shape {tuple(tensor.shape)}.")
    return tensor


def _matched(pattern: str, tensors: Mapping[str, Any], kind: str) -> dict[str, re.Match[str]]:
    """How each name matches; an error that says which do not, or that there is none."""
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    surplus = [name for name, match in matches.items() if not match]
    if surplus or not matches:
        raise InputError(
            f"Expected the tensors of a {kind}, found {shown(surplus, 3)} among {len(matches)}: is it another method's, "
            f"or a file without its folder?"
        )
    return {name: match for name, match in matches.items() if match}


def _find(source: str | os.PathLike, *names: str, **hub: Any) -> str | None:
    """The first of these files that the folder or hub repository has."""
    for name in names:
        try:
            return locate(source, name, **hub)
        except InputError:
            continue
    return None


def _read(file: str | os.PathLike) -> Tensors:
    """The float32 tensors of a file, by name. Nothing in it is run.

    Raises:
        InputError: the file is cut short, or holds more than finite floating-point tensors by name.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if str(file).endswith(".safetensors"):
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the readers stumble anywhere
        raise InputError(
            f"Cannot read {str(file)!r}: expected a whole file of tensors, and nothing that runs code; is it cut short?"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        for name, value in found.items()
    ):
        raise InputError(f"Expected a flat dictionary of floating-point tensors in {str(file)!r}, found something else.")
    broken = [name for name, value in found.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"Expected finite numbers in {str(file)!r}, found NaN or infinite ones in {shown(broken, 3)}.")
    return {name: value.detach().float() for name, value in found.items()}


def _read_json(file: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"Expected JSON in {file!r}, found something else ({error}); is it cut short?") from error
    if not isinstance(values, dict):
        raise InputError(f"Expected a JSON object in {file!r}, found {type(values).__name__}.")
    return values


def _write(converted: Conversion, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.clone().contiguous() for name, value in converted.tensors.items()}
    with replacing(folder / WEIGHTS_NAME) as weights, replacing(folder / CONFIG_NAME) as description:
        description.write_text(converted.config.to_json(), encoding="utf-8")
        save_file(tensors, weights, metadata={"format": "pt"})
    numbers = sum(value.numel() for value in tensors.values())
    write_card(folder, converted.config.base_model_name_or_path, numbers)
