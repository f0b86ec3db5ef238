"""The paper's default modules for each architecture: keys, values and the input of the feed-forward's second
projection.

transformers has a few dozen naming schemes for the projections of a block. The tables here list them for all
architectures: the names of key and value projections, the layout of fused projections, the names of a feed-forward's
two projections. `default_sites` applies them to a model, and refuses a model if an attention or feed-forward block
gets no vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ia3.adapter.rules import find_rule
from ia3.errors import InputError, shown

# Classes that read `weight` and `bias` of a projection instead of calling it: torch's own classes always or on their
# fast path, WavLM always, DeBERTa if its decoder takes several steps, BLOOM if it splits sums as in tensor-parallel
# training (`slow_but_exact`).
READS_WEIGHTS = frozenset(
    {"MultiheadAttention", "TransformerEncoderLayer", "WavLMAttention", "DisentangledSelfAttention", "BloomMLP"}
)

# Modules whose parts get activations of shape (length, batch, features).
_TIME_FIRST = frozenset(
    {
        "modeling_fsmt.Attention",
        "modeling_fsmt.DecoderLayer",
        "modeling_fsmt.EncoderLayer",
        "modeling_led.LEDEncoderSelfAttention",
        "modeling_longformer.LongformerSelfAttention",
        "modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer",
        "modeling_oneformer.OneFormerTextMLP",
        "modeling_oneformer.OneFormerTransformerDecoderFFNLayer",
        "modeling_xlnet.XLNetFeedForward",
    }
)

# Guided generation appends a second batch, without the prompts, here. Then the activations of a row are not one block.
DOUBLED = frozenset({"dia", "janus", "musicgen", "musicgen_melody"})

# Parts that get the images, videos or sounds of all rows in one sequence; each row may have any number.
TOWER = re.compile(r"(^|\.)\w*(vision|visual|image|video|audio|speech|projector|merger|connector)\w*\.")

# Experts that are separate modules get a selection of tokens without their rows.
_SCATTERED = re.compile(r"(^|\.)experts\.(expert_)?\d+\.")


def row_axis(path: str, parent: nn.Module) -> int | None:
    """The axis of a module's activations with the rows of a batch; None: there is none.

    Args:
        path: the module's path in the base model.
        parent: the module that calls it.
    """
    if _SCATTERED.search(path):
        return None
    if getattr(getattr(parent, "self_attn", None), "batch_first", True) is False:  # torch's own transformer layers
        return 1
    return 1 if f"{type(parent).__module__.rpartition('.')[2]}.{type(parent).__name__}" in _TIME_FIRST else 0


def uneven_media(config: PretrainedConfig | None, tokens: torch.Tensor) -> str | None:
    """The medium ("image", "video", "audio") whose number of tokens differs among rows (B, length); None: no medium."""
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                places = (tokens == token).sum(-1)
                if bool((places != places[0]).any()):
                    return kind
    return None


@dataclass(frozen=True)
class Site:
    """A place for a vector.

    Attributes:
        path: dotted path in the base model of the module to rescale.
        feedforward: whether its input is rescaled (a second feed-forward projection, experts), instead of its output.
        rescaled: for a fused projection, a boolean mask of the output features that are keys or values; None: all are.
    """

    path: str
    feedforward: bool
    rescaled: torch.Tensor | None = None


# --- Keys and values ----------------------------------------------------------------------------------------------

# Names of key and value projections in one attention module. BiMultiHeadAttention uses one product of scores for both
# directions, so the vector of the "text" side rescales both.
_KEY_VALUE = (
    "k_proj v_proj, key value, k v, k_lin v_lin, Wk Wv, k_head v_head, key_proj value_proj, linear_k linear_v, "
    "project_k project_v, projection_key projection_value, key_global value_global, layout_key layout_value, "
    "key_protein value_protein, text_proj values_text_proj values_vision_proj, kv_b_proj, to_kv, kv_proj, keys_values"
)
_SIBLINGS = [names.split() for names in _KEY_VALUE.split(", ")]
_KEYS, _VALUES = ({names[place] for names in _SIBLINGS if len(names) == 2} for place in (0, 1))
# Deformable attention samples values at learned offsets: it has no keys.
_VALUE_ONLY = {"value_proj": "sampling_offsets"}


def _mask(*widths: int, repeat: int = 1) -> torch.Tensor:
    """A mask from the widths of alternating runs: others first, then keys and values, then others, …"""
    runs = [torch.full((width,), i % 2 == 1, device="cpu") for i, width in enumerate(widths)]
    return torch.cat(runs * repeat)


def _attribute(attention: nn.Module, *names: str) -> int | None:
    owners = (attention, getattr(attention, "config", None))
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _heads(attention: nn.Module) -> tuple[int, int]:
    """The number of query heads, and of key/value heads."""
    heads = _attribute(attention, "num_attention_heads", "num_heads", "n_heads", "n_head") or 1
    return heads, _attribute(attention, "num_key_value_heads", "num_kv_heads", "kv_heads") or heads


def _blocks(attention: nn.Module, features: int) -> torch.Tensor:
    """[queries | keys | values]; keys and values may have fewer heads than queries."""
    heads, shared = _heads(attention)
    width = features // (heads + 2 * shared)
    return _mask(heads * width, 2 * shared * width)


def _by_head(attention: nn.Module, features: int) -> torch.Tensor:
    """For each head, [query | key | value]."""
    heads, _ = _heads(attention)
    return _mask(features // heads // 3, features // heads // 3 * 2, repeat=heads)


def _falcon(attention: nn.Module, features: int) -> torch.Tensor:
    """For each key/value head, [its queries | key | value]; one such head if "multi-query"; otherwise by head."""
    if not hasattr(attention, "new_decoder_architecture"):  # BLOOM, GPT-NeoX, Persimmon
        return _by_head(attention, features)
    heads, shared = _heads(attention)
    if not attention.new_decoder_architecture:
        shared = 1 if attention.multi_query else heads
    width = features // (heads + 2 * shared)
    return _mask(heads // shared * width, 2 * width, repeat=shared)


def _gpt2(attention: nn.Module, features: int) -> torch.Tensor | None:
    """[queries | keys | values], without queries in cross-attention; GPTBigCode: by head unless "multi-query"."""
    if hasattr(attention, "q_attn"):
        return None
    return (_blocks if getattr(attention, "multi_query", True) else _by_head)(attention, features)


def _codegen(attention: nn.Module, features: int) -> torch.Tensor:
    """Four times [queries | values | keys], because the model was split for training."""
    return _mask(features // 12, features // 6, repeat=4)


def _levit(attention: nn.Module, features: int) -> torch.Tensor:
    """For each head [query | key | wider value]."""
    heads, width = _heads(attention)[0], _attribute(attention, "key_dim") or 0
    return _mask(width, features // heads - width, repeat=heads)


def _one_query(attention: nn.Module, features: int) -> torch.Tensor:
    """MobileViT 2's separable attention: [one query | keys | values]."""
    return _mask(1, features - 1)


def _delta_net(attention: nn.Module, features: int) -> torch.Tensor:
    """[queries | keys | values]; values may be wider."""
    width = _attribute(attention, "key_dim") or features // 3
    return _mask(width, features - width)


def _delta_net_by_head(attention: nn.Module, features: int) -> torch.Tensor:
    """For each key head, [query | key | its values | the same number of gates]."""
    heads, width = _attribute(attention, "num_k_heads") or 1, _attribute(attention, "head_k_dim") or 0
    values = (features // heads - 2 * width) // 2
    return _mask(width, width + values, values, repeat=heads)


def _rotary_key(attention: nn.Module, features: int) -> torch.Tensor:
    """[compressed keys and values | the rotary part of the key, shared by all heads]."""
    width = _attribute(attention, "qk_rope_head_dim") or 0
    return _mask(features - width, width)


# Fused projections: name → function for the mask of keys and values in the output features.
_Layout = Callable[[nn.Module, int], "torch.Tensor | None"]
_FUSED: dict[str, _Layout] = {
    "qkv": _blocks,
    "qkv_proj": _blocks,
    "Wqkv": _blocks,
    "att_proj": _blocks,
    "qkv_linear": _blocks,
    "c_attn": _gpt2,
    "query_key_value": _falcon,
    "queries_keys_values": _levit,
    "in_proj_qkv": _delta_net,
    "in_proj_qkvz": _delta_net_by_head,
    "kv_a_proj_with_mqa": _rotary_key,
}
# Fused projections with an ambiguous name, by the class of the attention.
_FUSED_IN: dict[tuple[str, str], _Layout] = {
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("MiniMaxLightningAttention", "qkv_proj"): _by_head,
    ("MobileViTV2LinearSelfAttention", "qkv_proj"): _one_query,
    ("DisentangledSelfAttention", "in_proj"): _by_head,
}

# --- Feed-forwards ------------------------------------------------------------------------------------------------

# Name of the first projection → name of the second.
_PAIRS = (
    "up_proj down_proj, gate_up_proj down_proj, gate_proj down_proj, fc1 fc2, wi wo, wi_0 wo, Wi Wo, lin1 lin2, c_fc c_proj, "
    "dense_h_to_4h dense_4h_to_h, fc_in fc_out, linear1 linear2, linear_1 linear_2, linear_fc1 linear_fc2, "
    "linear_up linear_down, intermediate_dense output_dense, ffw_layer_1 ffw_layer_2, layer_1 layer_2, w1 w2, w_in w_out, "
    "ffn ffn_output, proj_up proj_down, dense1 dense2, conv1 conv2, conv_1 conv_2, in_proj out_proj, proj_in proj_out, "
    "input_linear output_linear, intermediate output"
)
_FIRST_SECOND = {tuple(names.split()) for names in _PAIRS.split(", ")}
# Second projections in a separate module beside that of the first: BERT's `output.dense` and `intermediate.dense`.
_OUTPUT = re.compile(r"(\w+_)?output(_\w+)?")
_INTERMEDIATE = re.compile(r"(\w+_)?(intermediate|inter)(_\w+)?")

# Gated feed-forwards, W_down(act(W_gate x) ⊙ W_up x): names of W_gate and W_up. A vector on the output of W_up is the
# same function as one on the input of W_down.
_GATED = [tuple(names.split()) for names in ("wi_0 wi_1", "gate_proj up_proj", "w1 w3")]
# Both in one projection: [W_gate | W_up].
_GATE_AND_OTHER = ("gate_up_proj",)
# Gated feed-forwards with a further operation in between: a norm, a clamp, another type of adapter.
_NOT_ONLY_GATED = {"BitNetMLP", "MiniMaxM3VLDenseMLP", "Zamba2MLP"}

# Names of feed-forward blocks, or of layers that hold the projections directly.
_BLOCK = re.compile(
    r"\d+|\w*(mlp|ffn|ffw|feed_?forward|experts?)\w*|ff\d?|mixer|DenseReluDense|intermediate|module"
    r"|(deformable|text_enhancer)_layer"
)
# Names of second projections that other modules use too. They count only in a parent with a feed-forward's name.
_AMBIGUOUS = {"conv2", "conv_2", "dense2", "out_proj", "proj_out", "output_linear", "output"}
_PLAIN = re.compile(r"(shared_)?mlp|ffn?|feed_forward\w*")

# Modules between a tower and the language model, or beside the layers. Only layers inside them are rescaled.
_BETWEEN = re.compile(r"\w*(projector|projection|merger|aligner|connector|classifier)\w*|\w+_layernorm")
_LAYER = re.compile(r"(^|\.)(\w*(layers?|blocks?)|h)\.\d+(\.|$)")

# --- Exceptions ---------------------------------------------------------------------------------------------------

# Attentions without separate keys and values for a vector.
_REFUSED = {
    "DeepseekV4Attention": "one projection makes its keys and its values",
    "LSHSelfAttention": "one projection makes its queries and its keys",
    "ZayaAttention": "its keys are mixed with its queries by a convolution",
    "RwkvSelfAttention": "it has no attention; its time mixing is recurrent",
    "IBertSelfAttention": "its quantized projections return a scale beside their output",
    "SwiftFormerEfficientAdditiveAttention": "its additive attention has no values",
}

_ATTENTION_CLASS = re.compile(r"(Attention|Attn|MLA|DeltaNet)(?!.*(MLP|Output))")
_FEEDFORWARD_CLASS = re.compile(r"MLP|Mlp|FeedForward|FFN|DenseAct|Experts")

_PROJECTIONS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Tree:
    """A model's modules, by path and by parent."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.children: dict[str, dict[str, nn.Module]] = {}
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            self.children.setdefault(parent, {})[name] = module

    def projection(self, parent: str, name: str) -> str | None:
        """The path of a projection, or of the one inside a module that clips or normalizes its output; None if
        missing."""
        outer = f"{parent}.{name}" if parent else name
        for path in (outer, f"{outer}.linear", f"{outer}.convolution"):
            module = self.modules.get(path)
            if isinstance(module, _PROJECTIONS) or hasattr(module, "in_features"):  # quantized ones have no base class
                return path
            if type(module).__name__ == "JetMoeParallelExperts":
                return path
        return None

    def projections(self, parent: str) -> list[str]:
        """The paths of projections directly in a module."""
        found = (self.projection(parent, name) for name in self.children.get(parent, ()))
        return [path for path in found if path is not None]

    def key_value_sites(self, parent: str) -> Iterator[Site]:
        """The sites of an attention module's keys and values."""
        names, attention = self.children.get(parent, {}), self.modules.get(parent, nn.Module())
        if isinstance(attention, nn.MultiheadAttention) or {"k", "v"} <= attention._parameters.keys():  # or XLNet's
            yield Site(parent, False)
        for siblings in _SIBLINGS:
            paths = [self.projection(parent, name) for name in siblings if name in names]
            if len(paths) == len(siblings):
                yield from (Site(path, False) for path in paths if path is not None)
        for name in names:
            layout = _FUSED_IN.get((type(attention).__name__, name)) or _FUSED.get(name)
            path = self.projection(parent, name)
            if layout is not None and path is not None:
                mask = layout(attention, _features(self.modules[path]))
                if mask is None or mask.any():
                    yield Site(path, False, mask)
            if _VALUE_ONLY.get(name) in names and path is not None:
                yield Site(path, False)

    def has_intermediate(self, layer: str) -> bool:
        """Whether a layer has a separate module for its first feed-forward projection."""
        return any(_INTERMEDIATE.fullmatch(name) for name in self.children.get(layer, ()))

    def feedforward_sites(self, parent: str) -> Iterator[Site]:
        """The sites of the second projections, or experts, directly in a module."""
        module, (above, _, called) = self.modules.get(parent), parent.rpartition(".")
        names = self.children.get(parent, {})
        raw = {} if module is None else module._parameters
        if getattr(raw.get("down_proj"), "ndim", 0) == 3 or {"w1", "v1", "w2"} <= raw.keys():
            yield Site(parent, True)
        for name in names:
            path = self.projection(parent, name)
            if path is None:
                continue
            if any((first, name) in _FIRST_SECOND for first in names):
                if (_PLAIN if name in _AMBIGUOUS else _BLOCK).fullmatch(called):
                    yield Site(path, True)
            elif name in ("dense", "conv1d") and _OUTPUT.fullmatch(called) and self.has_intermediate(above):
                yield Site(path, True)
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and re.search(r"\.\d+\.", parent):
            own = self.projections(parent)
            if len(own) > 1 and _PLAIN.fullmatch(above.rpartition(".")[2] if called == "layers" else called):
                yield Site(own[-1], True)

    def output_site(self, site: Site) -> Site | None:
        """See `output_sites`."""
        parent = re.sub(r"\.(linear|convolution)$", "", site.path).rpartition(".")[0]
        names = self.children.get(parent, {})
        if type(self.modules.get(parent)).__name__ in _NOT_ONLY_GATED:
            return None
        for gate, other in _GATED:
            path = self.projection(parent, other) if gate in names else None
            if path is not None and path != site.path:
                return Site(path, False)
        for name in _GATE_AND_OTHER:
            path = self.projection(parent, name) if name in names else None
            if path is not None:
                half = _features(self.modules[path]) // 2
                return Site(path, False, _mask(half, half))
        return None


def default_sites(modules: Mapping[str, nn.Module], config: PretrainedConfig | None) -> list[Site]:
    """The sites of the paper's vectors in a model: keys, values and the input of the feed-forward's second projection.

    Args:
        modules: path → module of the base model, in the model's order, without wrappers.
        config: the model's config; None for a model without one.

    Returns:
        The sites in the model's order.

    Raises:
        InputError: the architecture is unknown, has no attention or one that vectors cannot rescale, or the rules miss
            one of its attention or feed-forward blocks.
    """
    model_type = _known(modules, config, "target_modules")
    tree = _Tree(modules)
    for path, module in modules.items():
        if type(module).__name__ in _REFUSED:
            _refuse(modules, model_type, "target_modules", f"{_REFUSED[type(module).__name__]} ({path!r})")
    keys_values, feedforward = _sites(tree, tree.key_value_sites), _sites(tree, tree.feedforward_sites)
    if not keys_values:
        _refuse(modules, model_type, "target_modules", "it has no attention with keys and values of its own")
    left_out = [*_attentions_left_out(tree, keys_values), *_feedforwards_left_out(tree, feedforward)]
    if left_out:
        _refuse(modules, model_type, "target_modules", f"the rules do not cover {shown(left_out, 3)}")
    order = {path: i for i, path in enumerate(modules)}
    return sorted([*keys_values, *feedforward], key=lambda site: order[site.path])


def feedforward_sites(modules: Mapping[str, nn.Module], config: PretrainedConfig | None) -> list[Site]:
    """The feed-forward sites of `default_sites`, also for an architecture whose attention it refuses.

    Raises:
        InputError: the architecture is unknown, or the rules miss one of its feed-forward blocks.
    """
    model_type = _known(modules, config, "feedforward_modules")
    tree = _Tree(modules)
    sites = _sites(tree, tree.feedforward_sites)
    left_out = list(_feedforwards_left_out(tree, sites))
    if left_out:
        _refuse(modules, model_type, "feedforward_modules", f"the rules do not cover {shown(left_out, 3)}")
    order = {path: i for i, path in enumerate(modules)}
    return sorted(sites, key=lambda site: order[site.path])


def output_sites(modules: Mapping[str, nn.Module], sites: Iterable[Site]) -> dict[str, Site | None]:
    """Sites on outputs that are the same function as sites on the input of a feed-forward's second projection.

    Args:
        modules: see `default_sites`.
        sites: the sites of second projections or experts.

    Returns:
        Path of a site → the site on an output; None for feed-forwards without a gate, where the activation is in
        between.
    """
    tree = _Tree(modules)
    return {site.path: tree.output_site(site) for site in sites}


def kind_of(path: str) -> str:
    """What a module whose output is rescaled makes: "key", "value", "key and value" where both are fused, or its own name."""
    name = path.rpartition(".")[2]
    if name in _KEYS:
        return "key"
    if name in _VALUES:
        return "value"
    return "key and value" if name in _FUSED or [name] in _SIBLINGS else name


def _features(projection: nn.Module) -> int:
    """The number of output features of a projection."""
    names = ("out_features", "out_channels", "nf")
    return next(getattr(projection, name) for name in names if hasattr(projection, name))


def _between(path: str) -> bool:
    """Whether a module is between the towers or in a head, and not inside a layer there."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if _BETWEEN.fullmatch(part)), default=None)
    return last is not None and not _LAYER.search(".".join(parts[last + 1 :]))


def _sites(tree: _Tree, find: Callable[[str], Iterator[Site]]) -> list[Site]:
    """The sites that a rule finds in all modules; a module with several paths counts once."""
    found: dict[int, Site] = {}
    for parent in ("", *tree.modules):
        if not _between(parent):
            for site in find(parent):
                found.setdefault(id(tree.modules[site.path]), site)
    return list(found.values())


def _uncovered(tree: _Tree, classes: re.Pattern[str], sites: list[Site], deep: bool) -> Iterator[str]:
    """Modules whose class name matches and that have projections, directly or deeper inside, but no site."""
    covered = {id(tree.modules[path]) for site in sites for path in (site.path, *_parents(site.path))}
    for path, module in tree.modules.items():
        if classes.search(type(module).__name__) and id(module) not in covered and not _between(path):
            parts = module.modules() if deep else module.children()
            if sum(isinstance(part, _PROJECTIONS) for part in parts) > 1 or len(module._parameters) > 1:
                yield path


def _attentions_left_out(tree: _Tree, sites: list[Site]) -> Iterator[str]:
    for path in _uncovered(tree, _ATTENTION_CLASS, sites, True):
        # Deformable attention may sample its input itself, and a layer may attend to another layer's keys and values.
        samples = "sampling_offsets" in tree.children.get(path, ())
        if not samples and not getattr(tree.modules[path], "is_kv_shared_layer", False):
            yield path


def _feedforwards_left_out(tree: _Tree, sites: list[Site]) -> Iterator[str]:
    return (path for path in _uncovered(tree, _FEEDFORWARD_CLASS, sites, False) if _LAYER.search(path))


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _known(modules: Mapping[str, nn.Module], config: PretrainedConfig | None, field: str) -> str:
    """The model type. Raises an error if transformers does not register it."""
    model_type = getattr(config, "model_type", None)
    if model_type is None or model_type not in CONFIG_MAPPING_NAMES:
        _refuse(modules, model_type, field, "transformers does not register it")
    return model_type


def candidates(modules: Mapping[str, nn.Module]) -> str:
    """Names of modules that could be targets, for an error message."""
    names = {path.rpartition(".")[2] for path, module in modules.items() if find_rule(module)}
    return shown(sorted(name for name in names if not name.isdecimal()) or sorted(names), 12, room=300)


def _refuse(modules: Mapping[str, nn.Module], model_type: str | None, field: str, why: str) -> NoReturn:
    raise InputError(
        f"Please specify `{field}` in the config: there is no default for the architecture {model_type!r}: {why}. "
        f"Modules that can be rescaled: {candidates(modules)}."
    )
