"""The tensors of a checkpoint: read them from any file, and check them against a model."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Container, Mapping

import torch

from ia3.errors import InputError, brief, shown
from ia3.files import reading

PREFIX = "base_model.model."

Tensors = dict[str, torch.Tensor]

# The dtypes that a checkpoint may have for a parameter of any of these dtypes. Tensors are cast.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(file: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors by name of a safetensors or `torch.save` file, and the header entries of a safetensors file.

    No code in the file is run.

    Raises:
        InputError: the file is cut short, or holds anything but tensors with all their numbers.
    """
    if not file.endswith(".safetensors"):
        return _read_torch_weights(file), {}
    from safetensors import safe_open

    with reading(file, "a whole safetensors file"), safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _read_torch_weights(file: str) -> Tensors:
    expected = "a flat dictionary of tensors and nothing that runs code"
    with reading(file, expected, "is it cut short? Save it as safetensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about odd pickles; the error is enough
        # torch also reads compressed archives, and a small file could then fill the memory.
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(file):
                    raise ValueError("it is compressed")
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its text would say how to read the file unsafely
            raise ValueError("it is damaged or holds something else") from error
        if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
            raise TypeError("it holds something else")
        for key, value in tensors.items():
            if not isinstance(value, torch.Tensor) or not _is_plain(value):
                raise TypeError(f"{brief(key)} is no tensor with all its numbers in the file")
        return dict(tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a number in memory for each element. An expanded tensor may have any number of elements."""
    return (
        (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def check_tensors(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    adapter_name: str,
    buffers: Container[str] = (),
) -> None:
    """Raise `InputError` unless `found` fits.

    Args:
        expected: name → tensor with the model's shape and dtype; its values do not matter, and it may be a meta tensor.
        found: must have exactly these names and shapes, and values that are finite in these dtypes.
        adapter_name: the name for the message.
        buffers: names of tensors that may be infinite, such as masks.
    """
    owner = f"Adapter {brief(adapter_name)}"
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected), key=str)
    if missing or surplus:
        raise InputError(
            f"does not fit this model: expected {len(expected)} tensors, found {len(found)}; missing: {shown(missing, 3)}; "
            f"surplus: {shown(surplus, 3)}. Is it for another base model?",
            owner=owner,
        )
    wrong = [
        f"{key} is {brief(tuple(found[key].shape))}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"has other shapes than this model: {'; '.join(wrong[:3])}{more}. Is it for another base model?",
            owner=owner,
        )
    problem = wrong_values(found, {key: value.dtype for key, value in expected.items()}, buffers)
    if problem:
        raise InputError(f"holds {problem}", "train it again", owner=owner)


def check_vector(name: str, tensor: torch.Tensor) -> None:
    """Raise `InputError` unless a tensor has at least one number and at most one dimension longer than 1."""
    if not tensor.numel() or max(tensor.shape, default=0) != tensor.numel():
        raise InputError(f"Expected a vector, found {brief(name)} of shape {brief(tuple(tensor.shape))}.")


def wrong_values(
    found: Mapping[str, torch.Tensor], held: Mapping[str, torch.dtype], buffers: Container[str] = ()
) -> str | None:
    """The problem with tensors' values, for an error message; None if there is none.

    Args:
        found: the tensors of a file.
        held: name → the dtype in the model. A value that is finite in the file can be infinite in it.
        buffers: names of tensors that may be infinite.
    """
    foreign = {key: value.dtype for key, value in found.items() if value.dtype != held[key]}
    foreign = {key: dtype for key, dtype in foreign.items() if not {dtype, held[key]} <= set(_FLOATS)}
    if foreign:
        key = next(iter(foreign))
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return f"{foreign[key]} in {brief(key)}{more} where {held[key]} is expected"
    learned = {key: value for key, value in found.items() if key not in buffers}
    infinite = [key for key, value in learned.items() if not _is_finite(value.to(held[key]))]
    in_file = [key for key in infinite if not _is_finite(found[key])]
    if in_file:
        return f"NaN or infinite values in {shown(in_file, 3)}"
    if infinite:
        return f"values in {shown(infinite, 3)} that are infinite in {held[infinite[0]]}, which they are held in"
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:  # 8-bit floats have no `isfinite`
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
