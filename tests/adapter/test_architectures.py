"""The census: every architecture of transformers gets its vectors, or says why it gets none.

What the rules find is held against two oracles that know nothing of names: the width of the feed-forward's intermediate
activation, and what arrives as queries, keys and values where the attention function is called.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ia3.adapter.architectures import Site, default_sites, feedforward_sites
from ia3.errors import InputError
from support import zoo
from support.zoo import NOTHING, REFUSED, TEXT, UNBUILT, built

pytestmark = pytest.mark.usefixtures("quiet")

OTHERS = sorted({*zoo.model_types(*zoo.REGISTRY)} - {*TEXT})


# Vision and speech types without attention: convolutions, poolings, recurrences; SwiftFormer's has no values.
_NO_ATTENTION = """
    bit convnext convnextv2 dac dinov3_convnext efficientnet encodec focalnet glm_image_vqmodel hgnet_v2 mobilenet_v1
    mobilenet_v2 muse_spark_audio patchtsmixer poolformer pp_lcnet pp_ocrv5_mobile_rec pp_ocrv5_server_rec
    pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec regnet resnet swiftformer textnet univnet uvdoc
    vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder
"""
NO_ATTENTION = _NO_ATTENTION.split()


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path}


def sites_of(model: nn.Module) -> list[Site]:
    return default_sites(modules_of(model), model.config)


# --- Feed-forwards, by width --------------------------------------------------------------------------------------

# Widths of the intermediate activation: what the tiny configs say, twice that for two shared experts, and four times
# the hidden size where a config has no say; types that compute theirs otherwise.
WIDTHS = (zoo.INNER, 2 * zoo.INNER, 4 * zoo.HIDDEN)
OTHER_WIDTHS = {
    "cpmant": (10240,),
    "ctrl": (8192,),
    "dbrx": (4 * zoo.INNER,),  # one row an expert and unit
    "distilbert": (zoo.HIDDEN,),
    "lfm2": (256,),
    "lilt": (zoo.INNER, zoo.INNER // 4),  # the layout stream is narrower
    "moshi": (zoo.INNER // 2,),
    "perceiver": (zoo.HIDDEN,),
    "recurrent_gemma": (zoo.INNER // 2,),
    "squeezebert": (zoo.INNER // 4,),  # in four groups
    "vibevoice_asr": (zoo.INNER, 8, 16, 32, 64, 128, 256, 512),
}
# As wide, but no feed-forward: embeddings, convolutions over mel bins, hyper-connections, projectors, adapters.
WIDE = re.compile(
    r"\.conv\d(\.|$)|embeddings\.|_hc$|hc_head|hyper_connection|(projector|merger)\.\w+$|xpath|_adapter_list"
)
# Where the intermediate activation is as wide as the hidden states, only the count of sites is compared.
SAME_WIDTH = {"distilbert", "perceiver", "vibevoice_asr"}


def input_widths(module: nn.Module) -> set[int]:
    """How wide a module's input may be by its weights' shapes; each axis of experts counts, some being transposed."""
    widths: set[int] = set()
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention)):
        return widths
    for name, weight in module._parameters.items():
        if weight is not None and weight.dim() > 1:
            if name != "weight":
                widths |= set(weight.shape)
            elif isinstance(module, (Conv1D, nn.Conv1d)):
                widths.add(weight.shape[0 if isinstance(module, Conv1D) else 1])
            else:
                widths.add(weight.shape[-1])
    return widths


def check_feedforwards(model_type: str, modules: dict[str, nn.Module], sites: list[Site]) -> None:
    found = {site.path for site in sites if site.feedforward}
    widths = set(OTHER_WIDTHS.get(model_type, WIDTHS))
    wide = {path for path, module in modules.items() if input_widths(module) & widths and not WIDE.search(path)}
    assert found
    assert found <= wide
    if model_type not in SAME_WIDTH:
        assert found == wide


# --- Keys and values, by what attention receives ------------------------------------------------------------------


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """The calls of the attention function: module, queries, keys and values; each answers zeros.

    Because attention answers zeros whatever it gets, scaled keys and values do not change what later layers see.
    """
    calls: list[Any] = []

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ):
        calls.append((module, query.clone(), key.clone(), value.clone()))
        rows, heads, length, _ = query.shape
        return query.new_zeros(rows, length, heads, value.shape[-1]), None

    model.set_attn_implementation("eager")
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    with pytest.MonkeyPatch.context() as patch:
        for source in sources:
            if hasattr(source, "eager_attention_forward"):
                patch.setattr(source, "eager_attention_forward", record)
        yield calls


@contextmanager
def scaled(modules: dict[str, nn.Module], sites: list[Site]) -> Iterator[None]:
    """Keys and values times a vector of random numbers over one."""

    def hook(mask: torch.Tensor | None):
        def scale(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            vector = 1.5 + torch.rand(output.shape[-1])
            return output * (vector if mask is None else torch.where(mask, vector, 1.0))

        return scale

    hooks = [modules[site.path].register_forward_hook(hook(site.rescaled)) for site in sites]
    yield
    for handle in hooks:
        handle.remove()


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which features of which heads differ anywhere."""
    return (before != after).any(dim=2).any(dim=0)


@torch.no_grad()
def check_attention(model: PreTrainedModel, sites: list[Site]) -> int:
    """Scale keys and values: the attention function gets others in every feature, and the same queries.

    Returns the number of attentions that were seen; those that compute attention by themselves are not.
    """
    modules = modules_of(model)
    paths = {id(module): path for path, module in modules.items()}
    batch = zoo.inputs(model)
    with recorded(model) as calls:
        torch.manual_seed(0)
        model(**batch)
        before = calls[:]
        calls.clear()
        seen = {paths[id(module)] for module, *_ in before}
        inside = [s for s in sites if not s.feedforward and any(s.path.startswith(f"{path}.") for path in seen)]
        with scaled(modules, inside):
            torch.manual_seed(0)
            model(**batch)
    assert len(calls) == len(before)
    for (module, query, key, value), (_, query2, key2, value2) in zip(before, calls, strict=True):
        path = paths[id(module)]
        assert torch.equal(query, query2), path
        assert changed(key, key2).all(), path
        assert changed(value, value2).all(), path
    return len(seen)


# --- Every attention and feed-forward class -----------------------------------------------------------------------

# Outside of layers: between the towers, and heads that predict boxes, masks and points.
OUTSIDE = re.compile(
    r"projector|projection|merger|aligner|connector|layernorm|head(\.|$)|hypernetworks|box_|hq_mask_mlp|timestep_proj"
    r"|dot_product_scoring|object_pointer_proj"
)


def check_classes(modules: dict[str, nn.Module], sites: list[Site]) -> None:
    """Every module that its class calls an attention or a feed-forward, and that has projections, has a site."""
    for pattern, feedforward in (
        (r"Attention(?!.*(MLP|Merger))|Attn", False),
        (r"(?i)mlp|feedforward|ffn|denseact|experts$", True),
    ):
        inside = [site.path for site in sites if site.feedforward is feedforward]
        for path, module in modules.items():
            own = [child for child in module.children() if isinstance(child, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d))]
            if not re.search(pattern, type(module).__name__) or len(own) + len(module._parameters) < 2:
                continue
            if OUTSIDE.search(path) or hasattr(module, "sampling_offsets") or is_sharing(module):
                continue
            assert any(site == path or site.startswith(f"{path}.") for site in inside), path


def is_sharing(attention: nn.Module) -> bool:
    """Whether an attention has no keys and values of its own but takes another layer's."""
    return hasattr(attention, "q_proj") and not hasattr(attention, "k_proj") and not hasattr(attention, "kv_b_proj")


# --- Fused projections, feature by feature ------------------------------------------------------------------------

# The attention's class and its fused projection → a type that has it.
FUSED = {
    ("Attention", "c_attn"): "openai-gpt",
    ("BarkSelfAttention", "att_proj"): "bark",
    ("Blip2Attention", "qkv"): "blip-2",
    ("BlipAttention", "qkv"): "blip",
    ("BloomAttention", "query_key_value"): "bloom",
    ("CodeGenAttention", "qkv_proj"): "codegen",
    ("CohereCompassVisionAttention", "qkv"): "cohere_compass_vision",
    ("DbrxAttention", "Wqkv"): "dbrx",
    ("DecisionTransformerGPT2Attention", "c_attn"): "decision_transformer",
    ("DisentangledSelfAttention", "in_proj"): "deberta",
    ("Exaone4_5_VisionAttention", "qkv"): "exaone4_5_vision",
    ("FalconAttention", "query_key_value"): "falcon",
    ("Florence2VisionChannelAttention", "qkv"): "florence2",
    ("Florence2VisionWindowAttention", "qkv"): "florence2",
    ("GPT2Attention", "c_attn"): "gpt2",
    ("GPTBigCodeAttention", "c_attn"): "gpt_bigcode",
    ("GPTNeoXAttention", "query_key_value"): "gpt_neox",
    ("GPTNeoXJapaneseAttention", "query_key_value"): "gpt_neox_japanese",
    ("Glm4vMoeVisionAttention", "qkv"): "glm4v_moe_vision",
    ("Glm4vVisionAttention", "qkv"): "glm4v_vision",
    ("Glm5NextVisionAttention", "qkv"): "glm5_next_vision",
    ("GlmImageVisionAttention", "qkv"): "glm_image_vision",
    ("GlmOcrVisionAttention", "qkv"): "glm_ocr_vision",
    ("GotOcr2VisionAttention", "qkv"): "got_ocr2",
    ("HieraMaskUnitAttention", "qkv"): "hiera",
    ("ImageGPTAttention", "c_attn"): "imagegpt",
    ("InstructBlipAttention", "qkv"): "instructblip",
    ("InstructBlipVideoAttention", "qkv"): "instructblipvideo",
    ("LevitAttention", "queries_keys_values.linear"): "levit",
    ("MgpstrAttention", "qkv"): "mgp-str",
    ("MiniMaxLightningAttention", "qkv_proj"): "minimax",
    ("MobileViTV2LinearSelfAttention", "qkv_proj.convolution"): "mobilevitv2",
    ("ModernBertAttention", "Wqkv"): "modernbert",
    ("MptAttention", "Wqkv"): "mpt",
    ("PPFormulaNetVisionAttention", "qkv"): "pp_formulanet",
    ("PersimmonAttention", "query_key_value"): "persimmon",
    ("Phi3Attention", "qkv_proj"): "phi3",
    ("Phi4MultimodalAttention", "qkv_proj"): "phi4_multimodal",
    ("Qwen2_5_VLVisionAttention", "qkv"): "qwen2_5_vl_vision",
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): "qwen3_next",
    ("Qwen3OmniMoeVisionAttention", "qkv"): "qwen3_omni_moe_thinker",
    ("Qwen3VLMoeVisionAttention", "qkv"): "qwen3_vl_moe_vision",
    ("Qwen3VLVisionAttention", "qkv"): "qwen3_vl_vision",
    ("Qwen3_5GatedDeltaNet", "in_proj_qkv"): "qwen3_5_text",
    ("Qwen3_5MoeGatedDeltaNet", "in_proj_qkv"): "qwen3_5_moe_text",
    ("Qwen3_5MoeVisionAttention", "qkv"): "qwen3_5_moe_vision",
    ("Qwen3_5VisionAttention", "qkv"): "qwen3_5_vision",
    ("Qwen4ExpTextGatedDeltaNet", "in_proj_qkv"): "qwen4_exp_text",
    ("Qwen4ExpVisionAttention", "qkv"): "qwen4_exp_vision",
    ("Sam2MultiScaleAttention", "qkv"): "sam2_hiera_det_model",
    ("SamHQVisionSdpaAttention", "qkv"): "sam_hq_vision_model",
    ("SamVisionSdpaAttention", "qkv"): "sam_vision_model",
    ("SegGptAttention", "qkv"): "seggpt",
    ("TimesformerSelfAttention", "qkv"): "timesformer",
    ("UnlimitedOcrSamVisionSdpaAttention", "qkv"): "unlimited_ocr",
    ("VisionAttention", "qkv"): "qwen2_vl",
    ("VitDetAttention", "qkv"): "vitdet",
}
# Not told apart by position: these attend over channels, or weigh all positions by one query.
NOT_BY_POSITION = {"Florence2VisionChannelAttention", "MobileViTV2LinearSelfAttention"}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("FalconAttention", "falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("FalconAttention", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("FalconAttention", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),
    ("GPTBigCodeAttention", "gpt_bigcode", {"multi_query": False}),
    ("Phi3Attention", "phi3", {"num_key_value_heads": 1}),
    ("Phi3Attention", "phi3", {"num_key_value_heads": 4}),
]


def fused(modules: dict[str, nn.Module], sites: list[Site]) -> dict[tuple[str, str], tuple[str, Site]]:
    """The first site of each fused layout, by its attention's class and its own name, with the attention's path."""
    found: dict[tuple[str, str], tuple[str, Site]] = {}
    for site in sites:
        if site.rescaled is not None and not site.path.endswith("kv_a_proj_with_mqa"):
            parts = site.path.split(".")
            own = 2 if parts[-1] in ("linear", "convolution") else 1
            parent = ".".join(parts[:-own])
            found.setdefault((type(modules[parent]).__name__, ".".join(parts[-own:])), (parent, site))
    return found


def arguments(model: PreTrainedModel, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with in a forward pass of the model, or else of the tower that it stands in."""
    modules, calls = dict(model.named_modules()), []
    above = ["", *(path[: match.start()] for match in re.finditer(r"\.", path))]
    hook = modules[path].register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    for part in (modules[name] for name in above):
        if isinstance(part, PreTrainedModel) and not calls:
            with suppress(Exception):  # the whole may need inputs of which the tower knows nothing
                part(**zoo.inputs(part))
    hook.remove()
    return calls[0]


def tensor(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(part for part in output if part is not None)
    return output


@torch.no_grad()
def reach(model: PreTrainedModel, path: str, site: Site) -> list[int]:
    """At how many positions an attention's output changes with each feature of one position's projection."""
    modules = dict(model.named_modules())
    attention, feature = modules[path], None
    args, kwargs = arguments(model, path)

    def disturb(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        last = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
        if feature is not None:
            last[(0,) * (last.dim() - 1)][feature] += 3.0
        return output

    counts = []
    hook = modules[site.path].register_forward_hook(disturb)
    base = tensor(attention(*args, **kwargs))
    assert site.rescaled is not None
    for feature in range(len(site.rescaled)):  # noqa: B007 (the hook reads it)
        difference = (tensor(attention(*args, **kwargs)) - base).abs().flatten(0, -2).amax(-1)
        counts.append(int((difference > 1e-6 * base.abs().max()).sum()))
    hook.remove()
    return counts


def check_fused(model: PreTrainedModel, attention: str) -> None:
    """A query acts at its own position (and the few that a short convolution spans), keys and values beyond."""
    modules = modules_of(model)
    for module in modules.values():
        if hasattr(module, "A_log"):  # linear attention that forgets slowly
            nn.init.constant_(module.A_log, -4.0)
    ((path, site),) = [where for key, where in fused(modules, sites_of(model)).items() if key[0] == attention]
    assert site.rescaled is not None
    counts = torch.tensor(reach(model, path, site))
    assert counts[~site.rescaled].max() < counts[site.rescaled].min()


@pytest.mark.parametrize(("attention", "model_type"), [(key[0], name) for key, name in sorted(FUSED.items())])
def test_mask_of_a_fused_projection_is_its_keys_and_values(attention: str, model_type: str) -> None:
    model = zoo.build(model_type)
    if attention not in NOT_BY_POSITION:
        check_fused(model, attention)
        return
    # Without keys and values nothing is left of the queries.
    modules = dict(model.named_modules())
    ((path, site),) = [w for key, w in fused(modules_of(model), sites_of(model)).items() if key[0] == attention]
    assert site.rescaled is not None
    mask, queries = site.rescaled, torch.zeros(len(site.rescaled))
    args, kwargs = arguments(model, path)
    shape = (-1, 1, 1) if attention.startswith("Mobile") else (-1,)
    modules[site.path].register_forward_hook(
        lambda module, inputs, output: torch.where(mask.view(shape), 0.0, output + queries.view(shape))
    )
    with torch.no_grad():
        before = tensor(modules[path](*args, **kwargs))
        queries = torch.randn(len(mask))
        assert torch.equal(tensor(modules[path](*args, **kwargs)), before)


@pytest.mark.parametrize(("attention", "model_type", "changes"), VARIANTS)
def test_mask_follows_the_config(attention: str, model_type: str, changes: dict[str, Any]) -> None:
    check_fused(zoo.build(model_type, **changes), attention)


def test_cross_attention_of_gpt2_has_keys_and_values_only() -> None:
    model = zoo.build("gpt2", add_cross_attention=True)
    masks = {site.path: site.rescaled for site in sites_of(model) if site.path.endswith("c_attn")}
    assert masks["transformer.h.0.crossattention.c_attn"] is None
    mask = masks["transformer.h.0.attn.c_attn"]
    assert mask is not None
    assert mask.tolist() == [False] * zoo.HIDDEN + [True] * 2 * zoo.HIDDEN


def test_latent_attention_rescales_the_rotary_key_beside_the_latent() -> None:
    model = zoo.build("deepseek_v3")
    sites = sites_of(model)
    masks = [site.rescaled for site in sites if site.path.endswith("kv_a_proj_with_mqa")]
    config = model.config
    assert len(masks) == zoo.LAYERS
    for mask in masks:
        assert mask is not None
        assert mask.tolist() == [False] * config.kv_lora_rank + [True] * config.qk_rope_head_dim


# --- The census ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TEXT)
def test_text_type(model_type: str) -> None:
    model = built(model_type, meta=False)
    modules = modules_of(model)
    why = {**REFUSED, **NOTHING}.get(model_type)
    if why is not None:
        with pytest.raises(InputError, match=why):
            sites_of(model)
        return
    sites = sites_of(model)
    assert any(not site.feedforward for site in sites)
    assert all(site.rescaled is None for site in sites if site.feedforward)
    assert [site.path for site in sites] == [path for path in modules if path in {site.path for site in sites}]
    assert [site for site in sites if site.feedforward] == feedforward_sites(modules, model.config)
    check_feedforwards(model_type, modules, sites)
    check_classes(modules, sites)
    assert fused(modules, sites).keys() <= FUSED.keys()
    if model_type != "voxtral_realtime":  # hears before it reads
        check_attention(model, sites)

    check_base_model(model, sites)


def check_base_model(model: PreTrainedModel, sites: list[Site]) -> None:
    """Without its head a model has the same sites."""
    if model.base_model is not model:
        inner = default_sites(modules_of(model.base_model), model.base_model.config)
        assert [f"{model.base_model_prefix}.{site.path}" for site in inner] == [site.path for site in sites]


@pytest.mark.parametrize(
    ("model_type", "auto_class"),
    [
        (model_type, auto_class)
        for auto_class in ("SEQ_2_SEQ_LM", "SEQ_CLS")
        for model_type in zoo.model_types(auto_class)
        if auto_class != zoo.auto_class_of(model_type) and model_type not in {*REFUSED, *NOTHING}
    ],
)
def test_text_type_under_another_head(model_type: str, auto_class: str) -> None:
    model = built(model_type, auto_class)
    modules, sites = modules_of(model), sites_of(model)
    check_feedforwards(model_type, modules, sites)
    check_classes(modules, sites)
    check_base_model(model, sites)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_type(model_type: str) -> None:
    model = built(model_type)
    modules = modules_of(model)
    if model_type in NO_ATTENTION:
        with pytest.raises(InputError, match=r"it has no attention|has no values"):
            sites_of(model)
        return
    sites = sites_of(model)
    assert any(not site.feedforward for site in sites)
    check_classes(modules, sites)
    assert fused(modules, sites).keys() <= FUSED.keys()


def test_census_is_nearly_complete() -> None:
    """Types that are not refused are tested, but for a few without a tiny model."""
    assert len(REFUSED) < 10
    assert len(NOTHING) < 10
    assert len(TEXT) - len(UNBUILT) >= 235


def test_attention_seen_by_its_calls_is_most_of_it() -> None:
    for model_type in ("llama", "bert", "deepseek_v3", "phi3", "bart", "qwen3_moe"):
        model = zoo.build(model_type)
        assert check_attention(model, sites_of(model)) >= zoo.LAYERS


# --- Errors -------------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama-of-mine")
        self.k_proj, self.v_proj = nn.Linear(2, 2), nn.Linear(2, 2)


def test_unregistered_architecture_is_refused_with_the_names_that_can_be_given() -> None:
    with pytest.raises(
        InputError, match=r"specify `target_modules` in the config.*'llama-of-mine'.*'k_proj', 'v_proj'"
    ):
        sites_of(Unknown())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"specify `target_modules` in the config.*None.*'k_proj', 'v_proj'"):
        default_sites(modules_of(Unknown()), None)
    with pytest.raises(InputError, match=r"specify `feedforward_modules` in the config"):
        feedforward_sites(modules_of(Unknown()), None)


def test_attention_that_the_rules_do_not_cover_is_refused() -> None:
    model = zoo.build("llama", meta=True)
    attention = model.model.layers[1].self_attn
    attention.k_other = attention.k_proj
    del attention.k_proj
    with pytest.raises(InputError, match=r"rules do not cover 'model\.layers\.1\.self_attn'"):
        sites_of(model)


def test_feedforward_that_the_rules_do_not_cover_is_refused() -> None:
    model = zoo.build("llama", meta=True)
    mlp = model.model.layers[1].mlp
    mlp.other = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(InputError, match=r"rules do not cover 'model\.layers\.1\.mlp'"):
        sites_of(model)


def test_keys_that_serve_as_values_are_refused() -> None:
    with pytest.raises(InputError, match="rules do not cover"):
        sites_of(zoo.build("gemma4_text", meta=True, attention_k_eq_v=True))


def test_module_in_two_places_counts_once() -> None:
    model = zoo.build("llama", meta=True)
    model.model.layers[1] = model.model.layers[0]
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    assert {site.path.split(".")[2] for site in default_sites(modules, model.config)} == {"0"}
