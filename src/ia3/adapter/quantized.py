"""Merge vectors into the weights of quantized Linear layers of bitsandbytes and torchao.

A vector on the output side rescales rows of the weight (out, in), as the rows' scales do, so it is folded into the
scales exactly. A vector on the input side rescales columns, which share a scale. So the weight is dequantized,
rescaled and quantized again with the same settings, and the error is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ia3.errors import InputError

# A smaller error is rounding of float32 scales, not of quantized values.
_EXACT = 1e-6


class Format(NamedTuple):
    """Functions for a quantized weight (out, in).

    Attributes:
        dequantize: returns its values in float32.
        requantize: returns a weight with the same settings and new float32 values.
        fold: returns a weight with each row times an entry of a float32 vector (out,), by changing only the scales;
            None if several rows share a scale.
    """

    dequantize: Callable[[Any], torch.Tensor]
    requantize: Callable[[Any, torch.Tensor], Any]
    fold: Callable[[Any, torch.Tensor], Any]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a Linear whose weight bitsandbytes or torchao has quantized."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    if type(weight) is nn.Parameter:  # checked first, because torch.compile cannot read a type's module
        return False
    package = type(weight).__module__.partition(".")[0]
    if package == "bitsandbytes":
        # Both classes first hold the unquantized weight. A 4-bit weight may be stored as any dtype.
        return weight.dtype == torch.int8 or getattr(weight, "bnb_quantized", False)
    return package == "torchao"


def library(module: nn.Module) -> str | None:
    """The library that quantized a module: "bnb 8bit", "bnb 4bit" or "torchao"; None if it is not quantized."""
    if not is_quantized(module):
        return None
    return {"Int8Params": "bnb 8bit", "Params4bit": "bnb 4bit"}.get(type(module.weight).__name__, "torchao")


@torch.no_grad()
def rescaled(
    module: nn.Module, before: torch.Tensor | None, after: torch.Tensor | None
) -> tuple[dict[str, Any], float]:
    """The attributes that change W x + b to after ⊙ (W (before ⊙ x) + b) in a quantized Linear. The module is
    unchanged.

    Args:
        module: a Linear for which `is_quantized` is true.
        before: a flat float32 vector over the input features.
        after: a flat float32 vector over the output features.

    Returns:
        The attributes to set on the module, by name: parameters (new objects) and other attributes of the format. And
        the relative error of the new weight in the Frobenius norm, 0.0 if the scales represent the vectors exactly.
        Setting the old attributes again restores the module bit for bit.

    Raises:
        InputError: the weight's format is unknown.
    """
    weight = _weight(module)
    form = _FORMATS.get(type(weight).__name__)
    if form is None or getattr(weight, "act_mapping_type", None) is not None:
        known = ", ".join(sorted(_FORMATS))
        raise InputError(
            f"Cannot multiply vectors into a quantized weight of type {type(weight).__name__} (known: {known}); leave "
            "the adapter unmerged or load the model without quantization."
        )
    values: dict[str, Any] = {}
    error = 0.0
    if before is not None or after is not None:
        target = form.dequantize(weight)
        if before is not None:
            target = target * before
        new: Any = weight if before is None else form.requantize(weight, target)
        if after is not None:
            target = target * after.unsqueeze(1)
            folded = form.fold(new, after)
            new = form.requantize(weight, target) if folded is None else folded
        deviation = (form.dequantize(new) - target).norm() / target.norm().clamp(min=torch.finfo(target.dtype).tiny)
        error = 0.0 if deviation <= _EXACT else deviation.item()
        if type(weight).__name__ == "Params4bit":
            values["quant_state"] = new.quant_state  # the layer also refers to it
        elif type(weight).__name__ == "Int8Params":
            state: Any = copy.copy(module.state)
            state.CB = state.SCB = None  # the next forward pass moves them here from the weight
            values["state"] = state
        values["weight"] = new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=False)
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    if bias is not None and after is not None:
        values["bias"] = nn.Parameter((bias.float() * after).to(bias.dtype), requires_grad=bias.requires_grad)
    return values, error


def passes_gradients(module: nn.Module) -> bool:
    """Whether a quantized Linear passes gradients to its input, which vectors below it need for training.

    torchao's layers that also quantize activations pass none, without an error. Neither do layers in the layout that
    `keep_plain_layout` prevents.
    """
    weight: Any = module.weight
    quantizes_input = any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    return not (quantizes_input or packed or type(weight).__name__ == "Int4OpaqueTensor")


def keep_plain_layout(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes in the layout that has gradients and can be saved.

    On processors with AVX512-BF16, the first forward pass without gradients packs the weight for another kernel. That
    kernel has no backward pass, rounds the scales to bfloat16, and needs in and out features that are multiples of the
    blocks. In `state_dict`, bitsandbytes 0.50 then unpacks unquantized scales in the wrong order. This function unpacks
    layers that are packed already.
    """
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, weight.quant_state = _plain_4bit(weight)
                weight.compress_statistics = False
                module.quant_state = weight.quant_state  # type: ignore[assignment]


def release_dequantized(model: nn.Module) -> None:
    """Remove the marks of a quantized file from a model that was dequantized on loading (GGUF).

    transformers keeps them, and then refuses to train or save a model that has plain floating-point weights.
    """
    config = getattr(model, "config", None)
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if method == "gguf" and not any(map(is_quantized, model.modules())):
        del config.quantization_config  # type: ignore[union-attr]
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]


def _weight(module: nn.Module) -> Any:
    """A module's weight, with the scales that bitsandbytes moves to the layer in the first 8-bit forward pass."""
    weight: Any = module.weight
    if type(weight).__name__ == "Int8Params" and weight.SCB is None:
        return _int8(weight, weight.data, module.state.SCB)  # type: ignore[union-attr]
    return weight


# --- bitsandbytes, 8 bits: W = CB * SCB / 127, a scale for each row (Dettmers et al. 2022, arXiv:2208.07339).


def _int8(weight: Any, values: torch.Tensor, scales: torch.Tensor) -> Any:
    return type(weight)(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)


def _dequantize_int8(weight: Any) -> torch.Tensor:
    return weight.data * (weight.SCB / 127).unsqueeze(1)


def _requantize_int8(weight: Any, values: torch.Tensor) -> Any:
    scales = values.abs().amax(dim=1)
    steps = (scales / 127).clamp(min=torch.finfo(scales.dtype).tiny).unsqueeze(1)  # no division by 0
    return _int8(weight, (values / steps).round().to(torch.int8), scales)


def _fold_int8(weight: Any, after: torch.Tensor) -> Any:
    return _int8(weight, weight.data, weight.SCB * after)


# --- bitsandbytes, 4 bits: a scale (absmax) for each block of the flattened weight, itself quantized when nested
# --- (Dettmers et al. 2023, arXiv:2305.14314).


def _plain_4bit(weight: Any) -> tuple[torch.Tensor, Any]:
    """The packed values, and a new quantization state with float32 scales in the order of the blocks."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    values, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        absmax = state.absmax.T.reshape(-1)  # (in / blocksize, out) in this layout
        state.original_nested = False  # otherwise it would quantize the scales again
        values, state = functional._convert_weight_packed_for_cpu_inverse(values, state)
    elif state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        absmax = state.absmax
    state.absmax, state.nested, state.state2, state.offset = absmax.float(), False, None, None
    return values, state


def _params_4bit(weight: Any, values: torch.Tensor, state: Any) -> Any:
    return type(weight)(
        values,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
        module=weight.module,
        bnb_quantized=True,
    )


def _dequantize_4bit(weight: Any) -> torch.Tensor:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    values, state = _plain_4bit(weight)
    state.dtype = torch.float32
    return functional.dequantize_4bit(values, state)


def _requantize_4bit(weight: Any, values: torch.Tensor) -> Any:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    old = weight.quant_state
    packed, state = functional.quantize_4bit(
        values,
        blocksize=old.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=weight.quant_storage,
    )
    state.dtype = getattr(old, "original_dtype", old.dtype)
    return _params_4bit(weight, packed, state)


def _fold_4bit(weight: Any, after: torch.Tensor) -> Any:
    values, state = _plain_4bit(weight)
    blocks, rest = divmod(state.shape[1], state.blocksize)
    if rest:
        return None
    state.absmax = state.absmax * after.repeat_interleave(blocks)
    return _params_4bit(weight, values, state)


# --- torchao, tensors with `scale` (out / block_size[0], in / block_size[1]): W = (qdata - zero_point) * scale.


def _replace(weight: Any, **changes: Any) -> Any:
    """A copy of a torchao tensor with some parts replaced."""
    kinds = ("tensor_data_names", "tensor_attribute_names")
    names = [name for kind in kinds for prefix in ("", "optional_") for name in getattr(weight, prefix + kind, ())]
    return type(weight)(**{name: getattr(weight, name) for name in names} | changes)


def _dequantize_scaled(weight: Any) -> torch.Tensor:
    return _replace(weight, scale=weight.scale.float(), dtype=torch.float32).dequantize()


def _requantize_scaled(weight: Any, values: torch.Tensor) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        MappingType,
        PerGroup,
        PerRow,
        PerTensor,
    )

    block = list(weight.block_size)
    granularity = PerTensor() if block == list(weight.shape) else PerRow() if block[1] == weight.shape[1] else None
    granularity = granularity or PerGroup(block[1])
    if type(weight).__name__ == "Float8Tensor":
        new = type(weight).from_hp(values, weight.qdata.dtype, granularity)
        qdata = new.qdata.float().nan_to_num(0).to(new.qdata.dtype)  # a row of zeros was divided by its scale of 0
        return _replace(weight, qdata=qdata, scale=new.scale)
    symmetric = weight.zero_point is None or not weight.zero_point.any()
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    if type(weight).__name__ == "Int8Tensor":
        extra = {"reduce_range": weight.reduce_range} if hasattr(weight, "reduce_range") else {}
        new = type(weight).from_hp(values, granularity, mapping_type=mapping, **extra)
    else:
        new = type(weight).from_hp(values, weight.block_size, weight.target_dtype, mapping_type=mapping)
    return _replace(weight, qdata=new.qdata, scale=new.scale, zero_point=new.zero_point)


def _fold_scaled(weight: Any, after: torch.Tensor) -> Any:
    # If rows share a scale, each row gets a copy.
    rows = weight.block_size[0]
    changes = {"block_size": type(weight.block_size)([1, *weight.block_size[1:]])}
    changes["scale"] = weight.scale.float().repeat_interleave(rows, 0) * after.unsqueeze(1)
    if getattr(weight, "zero_point", None) is not None:
        changes["zero_point"] = weight.zero_point.repeat_interleave(rows, 0)
    return _replace(weight, **changes)


# --- torchao, 4 bits packed for CPUs: `scale_and_zero` (in / group, out, 2): W = (q - 8) * scale + zero.


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4)).flatten().int()


def _dequantize_opaque(weight: Any) -> torch.Tensor:
    # The packing is a permutation that depends on the processor. Pack the entries' positions, digit by digit in base
    # 16, to find it.
    places = torch.arange(weight.shape.numel(), dtype=torch.int32).view(weight.shape)
    origin = torch.zeros(weight.shape.numel(), dtype=torch.int32)
    for shift in range(0, weight.shape.numel().bit_length(), 4):
        digits = torch.ops.aten._convert_weight_to_int4pack_for_cpu((places >> shift) & 15, 1)
        origin += _nibbles(digits) << shift
    values = torch.empty(weight.shape.numel())
    values[origin] = _nibbles(weight.qdata).float() - 8
    groups = weight.scale_and_zero.float().transpose(0, 1)  # (out, in / group, 2)
    return (values.view(*groups.shape[:2], -1) * groups[..., :1] + groups[..., 1:]).view(weight.shape)


def _requantize_opaque(weight: Any, values: torch.Tensor) -> Any:
    new = type(weight).from_hp(values.contiguous(), weight.block_size)
    return _replace(weight, qdata=new.qdata, scale_and_zero=new.scale_and_zero.to(weight.scale_and_zero.dtype))


def _fold_opaque(weight: Any, after: torch.Tensor) -> Any:
    # The kernel needs them in the dtype of the activations, which may round.
    scales = weight.scale_and_zero * after.view(1, -1, 1)
    return _replace(weight, scale_and_zero=scales.to(weight.scale_and_zero.dtype))


_SCALED = Format(_dequantize_scaled, _requantize_scaled, _fold_scaled)
_FORMATS = {
    "Int8Params": Format(_dequantize_int8, _requantize_int8, _fold_int8),
    "Params4bit": Format(_dequantize_4bit, _requantize_4bit, _fold_4bit),
    "Int8Tensor": _SCALED,
    "IntxUnpackedToInt8Tensor": _SCALED,
    "Float8Tensor": _SCALED,
    "Int4OpaqueTensor": Format(_dequantize_opaque, _requantize_opaque, _fold_opaque),
}
