"""Tiny random models of every architecture that transformers registers, and a forward batch for each.

model = build("llama", "CAUSAL_LM")
model(**inputs(model))
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Auto classes by short name → model type → class name(s).
REGISTRY: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "IMAGE_CLS": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "SPEECH_SEQ_2_SEQ": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "IMAGE_TEXT": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "MODEL": modeling_auto.MODEL_MAPPING_NAMES,
}

HIDDEN, INNER, LAYERS, VOCAB = 32, 48, 2, 120

# What integers of a config are called → their tiny value; the first match counts.
_TINY: tuple[tuple[str, int], ...] = (
    (r"(key_value|kv)_heads$|n_head_kv$|num_kv_heads$|query_groups$|num_key_heads$|n_groups$", 2),
    (r"heads?$|num_value_heads$", 4),
    (r"(layers?|blocks|depth|layers_block|hidden_layers_\w+)$", LAYERS),
    (r"(rope|pe)_head_dim$", 4),
    (r"rotary_dim$", 4),
    (r"^n_group$|topk_group$|num_expert_group$", 1),
    (r"num_filters$", 2),
    (r"head_dim$|^d_kv$|d_head$|head_size$|kv_channels$", 8),
    (r"lora_rank$", 16),
    (r"(intermediate|inner|ffn|mlp)\w*(size|dim|hidden)$|d_ff$|n_inner$|ffn_dim$|d_inner$", INNER),
    (r"vocab_size$", VOCAB),
    (r"num_(local_|routed_)?experts$|n_routed_experts$|moe_num_experts$", 4),
    (r"top_?k$|experts_per_tok\w*$|moe_k$", 2),
    (r"(^|_)(hidden|embedding|embed|feature|model|output|projection|input)_?(size|dim|width)\w*$", HIDDEN),
    (r"d_model$|n_embd$|^dim$|embed_dim$|width$|proj_dim$|_hidden_dim$|hidden_size\w*$|d_embed$", HIDDEN),
    (r"image_size$", 64),
    (r"max_position_embeddings$|n_positions$|n_ctx$|max_\w*positions$", 128),
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}

_MROPE = re.compile(r"(glm4v|glm4v_moe|glm_ocr|glm_image|qwen2_vl|qwen2_5_vl|paddleocr_vl|hunyuan_vl)_text")

# The last two layers use the keys and values of the two before.
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}

# What the rules above get wrong, by model type: values set last.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "blt_global_transformer": {"hidden_size": 2 * HIDDEN, "head_dim": 16},
    "blt_local_decoder": {"hidden_size_global": 2 * HIDDEN},
    "blt_local_encoder": {"hidden_size_global": 2 * HIDDEN},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 100.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "donut-swin": {"embed_dim": 48, "window_size": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"per_layer_config": {}},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "flaubert": {"emb_dim": HIDDEN},
    "florence_vision": {
        "embed_dim": [16, 32, 64, 128],
        "num_heads": [2, 4, 8, 16],
        "num_groups": [2, 4, 8, 16],
        "depths": [1] * 4,
    },
    "gemma3n_text": {**_SHARED, "intermediate_size": [INNER] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": 8},
    "mamba2": {"head_dim": 16},
    "maskformer-swin": {"embed_dim": 48},
    "ministral": {"head_dim": 8},
    "mobilebert": {"true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "nemotron": {"num_key_value_heads": 2},
    "sam2_hiera_det_model": {
        "hidden_size": 24,
        "embed_dim_per_stage": [24, 48, 96, 192],
        "blocks_per_stage": [1] * 4,
        "global_attention_blocks": [2],
        "image_size": [64, 64],
    },
    "pegasus_x": {"block_size": 8},
    "perceiver": {"d_latents": HIDDEN, "num_latents": 8, "num_self_attends_per_block": LAYERS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 128,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "seggpt": {"image_size": [64, 32]},
    "swin": {"embed_dim": 48, "window_size": 2},
    "swin2sr": {"embed_dim": 48},
    "swinv2": {"embed_dim": 48},
    "xlm": {"emb_dim": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid"],
    },
}
# Types whose default config is not valid → what their config's constructor takes.
_ASSISTANT = {
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT}},
}


def model_types(*auto_classes: str) -> list[str]:
    """The types of some auto classes, sorted."""
    return sorted({name for auto_class in auto_classes for name in REGISTRY[auto_class]})


def auto_class_of(model_type: str) -> str:
    """The first auto class that has a type."""
    return next(name for name, types in REGISTRY.items() if model_type in types)


def _shrink(config: PretrainedConfig) -> None:
    assistant = getattr(config, "num_kv_shared_layers", 0) == LAYERS
    rotary = getattr(config, "qk_rope_head_dim", None)
    is_rotary = rotary is not None and rotary == getattr(config, "head_dim", None)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name.endswith(("token_id", "token_index")):
            continue
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
        elif isinstance(value, int):
            tiny = next((size for pattern, size in _TINY if re.search(pattern, name)), value)
            if tiny < value:
                setattr(config, name, tiny)
    for name, value in list(vars(config).items()):
        if name.endswith(("layer_types", "mlp_layer_types", "layers_block_type")) and isinstance(value, list):
            layers = getattr(config, "num_hidden_layers", LAYERS)
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds + [kinds[-1]] * layers)[:layers])
    for name, value in list(vars(config).items()):
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCAB:
            setattr(config, name, VOCAB - 1 - value % 8)
    ropes = getattr(config, "rope_parameters", None) or {}
    if ropes and (
        ropes.get("mrope_section") or _MROPE.match(config.model_type)
    ):  # the rotary dimensions of time, height and width: half a head
        half = int(4 * ropes.get("partial_rotary_factor", 1))
        config.rope_parameters = {**ropes, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if vars(config).get("kv_lora_rank"):  # latent attention has as many keys as queries
        config.num_key_value_heads = vars(config)["num_attention_heads"]
    if is_rotary:  # DeepSeek's
        config.head_dim = config.qk_rope_head_dim
    for key, value in ({} if assistant else _OVERRIDES.get(config.model_type, {})).items():
        owner, _, name = key.rpartition(".")
        setattr(getattr(config, owner) if owner else config, name, value)


def tiny_config(model_type: str) -> PretrainedConfig:
    """A tiny config of a type, without dropout."""
    config = CONFIG_MAPPING[model_type](**_ARGUMENTS.get(model_type, {}))
    _shrink(config)
    return config


def build(
    model_type: str, auto_class: str | None = None, meta: bool = False, seed: int = 0, **changes: Any
) -> transformers.PreTrainedModel:
    """A tiny model, in evaluation mode; every parameter is random and large enough to make a difference.

    Args:
        model_type: as transformers registers it.
        auto_class: a key of `REGISTRY`; None for the first that has the type.
        meta: on the meta device, which is quicker.
        seed: of its random parameters.
        changes: values of the config to set.

    Raises:
        ImportError: the model needs a library that is not installed.
    """
    name = REGISTRY[auto_class or auto_class_of(model_type)][model_type]
    if not isinstance(name, str):
        name = name[0]
    config = tiny_config(model_type)
    cls = getattr(transformers, name)
    if not isinstance(config, cls.config_class):  # the causal language model of a composite type
        parts = (getattr(config, name) for name in config.sub_configs)
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    for key, value in changes.items():
        setattr(config, key, value)
    if meta:
        # There is nothing to fill, and torch takes a long way to do nothing.
        with torch.device("meta"), no_init_weights():
            return cls(config).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in {id(parameter): parameter for parameter in model.parameters()}.values():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model: nn.Module, rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Any]:
    """Arguments of a forward pass, the simplest that the model's signature asks for: text alone where that is enough."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    books = getattr(config, "num_codebooks", 1) if config.model_type.startswith("musicgen") else 1
    tokens = torch.randint(4, VOCAB // 2, (rows * books, length), generator=generator)

    def size(*keys: str, default: Any) -> Any:
        """A config value by its first name that is set, in the config or its first sub-config that has it."""
        nested = [getattr(config, name, None) for name in config.sub_configs]
        found = (getattr(owner, key, None) for owner in (config, *nested) for key in keys)
        return next((value for value in found if value is not None), default)

    tokens %= size("vocab_size", default=VOCAB)
    batch: dict[str, Any] = {}
    if "inputs" in names:  # Perceiver
        batch["inputs"] = tokens
    elif "spatial_shapes" in names:  # SigLIP 2: flattened patches
        width = size("num_channels", default=3) * size("patch_size", default=16) ** 2
        batch["input_ids"] = tokens
        batch["pixel_values"] = torch.randn(rows, 16, width, generator=generator)
        batch["pixel_attention_mask"] = torch.ones(rows, 16, dtype=torch.long)
        batch["spatial_shapes"] = torch.full((rows, 2), 4)
        batch = {key: value for key, value in batch.items() if key in names}
    elif "input_ids" in names and model.main_input_name == "input_ids":
        batch["input_ids"] = tokens
        if "attention_mask" in names:
            batch["attention_mask"] = torch.ones_like(tokens)
    elif "grid_thw" in names:  # Qwen's vision towers: flattened patches
        patch, merged = size("patch_size", default=14), 2 * size("spatial_merge_size", default=2)
        width = size("in_channels", "in_chans", default=3) * size("temporal_patch_size", default=1) * patch * patch
        batch[next(iter(names))] = torch.randn(merged * merged, width, generator=generator)
        batch["grid_thw"] = torch.tensor([[1, merged, merged]])
    elif model.main_input_name == "pixel_values" or "pixel_values" in names:
        height, width = _pair(size("image_size", default=64))
        height //= 2 if "prompt_masks" in names else 1  # SegGPT puts an image and its prompt one above the other
        shape = [rows, size("num_channels", "in_channels", "num_input_channels", default=3), height, width]
        if size("num_frames", "frames_per_clip", default=None):
            shape.insert(1, size("num_frames", "frames_per_clip", default=None))
        images = [name for name in names if name.endswith("pixel_values") or name == "prompt_masks"]
        batch = {name: torch.randn(shape, generator=generator) for name in images or [next(iter(names))]}
        if "input_ids" in names:
            batch["input_ids"] = tokens
    elif "input_features" in names:
        bins, frames = size("num_mel_bins", "feature_size", default=80), 2 * size("max_source_positions", default=64)
        batch["input_features"] = torch.randn(rows, bins, frames, generator=generator)
    elif "input_values" in names:
        batch["input_values"] = torch.randn(rows, 8000, generator=generator)
    elif "inputs_embeds" in names:
        batch["inputs_embeds"] = torch.randn(rows, length, size("hidden_size", "d_model", default=HIDDEN))
    if "decoder_input_ids" in names:
        batch["decoder_input_ids"] = tokens.flip(1)
    if "use_cache" in names:
        batch["use_cache"] = False
    return batch


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


TEXT = model_types("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")

# Text types that cannot have vectors by default, and what the error says.
REFUSED = {
    "deepseek_v4": "one projection makes its keys and its values",
    "reformer": "one projection makes its queries and its keys",
    "zaya": "mixed with its queries",
    "ibert": "return a scale",
}
NOTHING = {
    "falcon_mamba": "no attention",
    "fnet": "no attention",
    "mamba": "no attention",
    "mamba2": "no attention",
    "rwkv": "no attention",
}


# Text types without a tiny model: these need a library, or their config cannot be tiny.
UNBUILT = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "layoutlmv2"}


def built(model_type: str, auto_class: str | None = None, meta: bool = True) -> transformers.PreTrainedModel:
    """A tiny model, or the test is skipped with the reason why there is none."""
    try:
        return build(model_type, auto_class, meta=meta)
    except (ImportError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if model_type in TEXT and model_type not in UNBUILT:
            raise
        why = "needs a library" if isinstance(error, ImportError) else "no tiny config"
        pytest.skip(f"{why}: {str(error).strip().splitlines()[0][:90]}")
