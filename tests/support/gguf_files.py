"""A tiny language model as a GGUF file, as llama.cpp's converter writes one."""

import re

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from support import tiny
from support.words import byte_level

# The name of a llama's module in a GGUF file.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(file, seed: int = 0) -> AutoModelForCausalLM:
    """Write a tiny Llama with a tokenizer of bytes, its matrices quantized to 8 bits where they can be; return the model before."""
    tokenizer = byte_level()
    model = tiny.build("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=512)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(names) - 2))
    writer.add_token_merges(["Ġ {", "a b"])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        theirs = f"blk.{layer[1]}.{_NAMES[layer[2]]}" if layer else _OUTSIDE[module]
        if layer and layer[2] in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
            tensor = _interleaved(tensor, heads)
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{theirs}.{kind}", gguf.quantize(values, kind8), raw_dtype=kind8)
        else:
            writer.add_tensor(f"{theirs}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection's rows in llama.cpp's order, where the two halves of a rotation are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
