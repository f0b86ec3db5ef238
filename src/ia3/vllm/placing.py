"""Place an adapter's vectors in an engine with fused projections: `place`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ia3.adapter.config import CONFIG_NAME, IA3Config, is_ia3
from ia3.adapter.tensors import PREFIX, Tensors, check_tensors
from ia3.errors import InputError, shown
from ia3.files import current, parse_json
from ia3.folder import AdapterFolder

_SUFFIX = ".ia3_l"


@dataclass(frozen=True)
class Layer:
    """A linear layer of the engine, with its full width over all tensor-parallel ranks.

    Attributes:
        parts: the engine's dotted paths of the fused projections; for a layer that is not fused, its own path.
        widths: the output features of each part.
        inputs: the input features, which all parts share.
        bias_apart: the bias is added later, in other code, so the output cannot be rescaled here.
        other_order: the weights have another order than the base model's, so a vector would not fit.
    """

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: int
    bias_apart: bool = False
    other_order: bool = False


@dataclass
class Scales:
    """An adapter's vectors for one layer.

    Attributes:
        inputs: (1, inputs), or None.
        outputs: (width, 1) or None for each part.
    """

    inputs: torch.Tensor | None = None
    outputs: list[torch.Tensor | None] = field(default_factory=list)


def read_config(folder: str | os.PathLike) -> IA3Config | None:
    """The config of an (IA)³ adapter's folder; None for another method's, and when there is no adapter at all.

    Raises:
        InputError: it is not JSON, or has fields that cannot be used.
    """
    path = os.path.join(folder, CONFIG_NAME)
    try:
        data = (current(folder) / CONFIG_NAME).read_bytes()
    except OSError:
        return None
    return IA3Config.from_json(data, path) if is_ia3(parse_json(data, path)) else None


def read_vectors(folder: str | os.PathLike, name: str) -> tuple[IA3Config, Tensors]:
    """An adapter's config, and its vectors by module path in the base model, as in the file.

    Args:
        folder: the folder, in PEFT's format or ours, with safetensors.
        name: the adapter's name, for error messages.

    Raises:
        InputError: the folder has no (IA)³ adapter or no safetensors, or more than vectors (`modules_to_save`).
    """
    its, tensors, _ = AdapterFolder.whole(folder, pickled=False)
    config = its.config
    others = sorted(key for key in tensors if not key.endswith(_SUFFIX))
    if others or config.modules_to_save:
        raise InputError(
            f"Adapter {name!r} trains modules in full ({shown(config.modules_to_save or others, 3)}, modules_to_save), "
            f"expected vectors only; serve it with ia3's own engine, or train it without."
        )
    if not tensors:
        raise InputError(f"Adapter {name!r} holds no vectors, expected at least one; save it again.")
    return config, {key.removeprefix(PREFIX).removesuffix(_SUFFIX): value for key, value in tensors.items()}


def place(
    vectors: Mapping[str, torch.Tensor],
    layers: Mapping[str, Layer],
    name: str,
    elsewhere: Callable[[str], bool] = lambda path: False,
) -> dict[str, Scales]:
    """An adapter's vectors for each layer, in float32.

    Args:
        vectors: the engine's module path → (1, in) for an input, (out, 1) for an output.
        layers: path → layer of the engine that can be rescaled.
        name: the adapter's name, for error messages.
        elsewhere: whether a path without a layer here belongs to another worker.

    Raises:
        InputError: a vector has no layer, a wrong shape or type, or is not finite in float32; or it rescales the input
            of a part of a fused layer, an output whose bias is added elsewhere, or one whose features have another
            order.
    """
    sites = {part: (path, number) for path, layer in layers.items() for number, part in enumerate(layer.parts)}
    lost = sorted(path for path in vectors if path not in sites and not elsewhere(path))
    if lost:
        known = sorted({path.rpartition(".")[2] for path in sites})
        raise InputError(
            f"Adapter {name!r} rescales {shown(lost, 3)}, expected modules among {shown(known, 12)} of this model (and "
            f"of lora_target_modules, where that is set). Is it for another base model?"
        )
    here = {path: vector for path, vector in vectors.items() if path in sites}
    expected = {}
    for path, vector in here.items():
        layer, number = layers[sites[path][0]], sites[path][1]
        shape = (1, layer.inputs) if _on_input(vector) else (layer.widths[number], 1)
        expected[path] = torch.empty(shape, dtype=torch.float32, device="meta")
    check_tensors(expected, here, name)
    here = {path: vector.float() for path, vector in here.items()}
    placed: dict[str, Scales] = {}
    for path, vector in here.items():
        owner, number = sites[path]
        layer = layers[owner]
        scales = placed.setdefault(owner, Scales(outputs=[None] * len(layer.parts)))
        if not _on_input(vector):
            _check_output(path, layer, name)
            scales.outputs[number] = vector
        elif len(layer.parts) > 1:
            others = [part.rpartition(".")[2] for part in layer.parts if part != path]
            raise InputError(
                f"Adapter {name!r} rescales the input of {path!r}, which is fused with {shown(others)} here and shares "
                f"its input with them; expected its output to be rescaled. Leave it out of feedforward_modules."
            )
        else:
            scales.inputs = vector
    return placed


def _on_input(vector: torch.Tensor) -> bool:
    return vector.dim() == 2 and vector.shape[0] == 1 and vector.shape[1] != 1


def _check_output(path: str, layer: Layer, name: str) -> None:
    if layer.bias_apart:
        raise InputError(
            f"Adapter {name!r} rescales the output of {path!r}, whose bias is added after it has left the layer "
            f"(skip_bias_add); expected a layer that adds its own. Exclude that module."
        )
    if layer.other_order:
        raise InputError(
            f"Adapter {name!r} rescales {path!r}, whose queries, keys and values may be in another order here than in "
            f"the base model; expected separate projections or a known order (phi3). Merge it (ia3 merge) instead."
        )
