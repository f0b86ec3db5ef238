"""Which modules a config chooses, and on which side: explicit patterns as PEFT reads them, defaults as the paper has them."""

import contextlib
import re
import warnings
from collections import Counter
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

import ia3
from ia3 import IA3Config, InputError
from ia3.adapter.targets import base_modules, matches, resolve, shortest_names
from support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def chosen(model, **fields) -> dict[str, bool]:
    """Path → whether its input is rescaled, by our resolution of a config."""
    return {target.path: target.feedforward for target in resolve(model, IA3Config(**fields)).targets}


def chosen_by_peft(model, **fields) -> dict[str, bool]:
    """The same by PEFT, which changes the model."""
    adapted = peft.get_peft_model(model, peft.IA3Config(**fields))
    return {
        name.removeprefix("base_model.model."): module.is_feedforward
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.ia3.IA3Layer)
    }


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# Matching.

component = st.sampled_from(["a", "b", "ab", "k", "0", "10"])
dotted = st.lists(component, min_size=1, max_size=4).map(".".join)


@given(dotted, st.lists(dotted | st.just(""), max_size=3))
def test_a_list_matches_whole_trailing_components(path, entries):
    parts = path.split(".")
    naive = any(parts[-len(entry.split(".")) :] == entry.split(".") for entry in entries)
    assert matches(path, entries) is naive
    assert matches(path, set(entries)) is naive
    theirs = check_target_module_exists(peft.IA3Config(target_modules=entries), path)
    assert bool(theirs) is naive


@given(dotted, st.sampled_from(["a", ".*a", r".*\.k", "(a|b)", r"a\.", r".*\.0\..*", "a|.*b", r"\w+", ".*", ""]))
def test_a_string_is_a_regular_expression_for_the_whole_path(path, pattern):
    assert matches(path, pattern) is (re.fullmatch(pattern, path) is not None)
    assert matches(path, pattern) is bool(check_target_module_exists(peft.IA3Config(target_modules=pattern), path))


@given(st.lists(dotted, min_size=1, max_size=8, unique=True), st.data())
def test_shortest_names_name_the_paths_and_no_other(paths, data):
    wanted = data.draw(st.sets(st.sampled_from(paths)))
    others = set(paths) - wanted
    names = shortest_names(wanted, others)
    # A path that is the tail of another one cannot be named without it; those are left to the caller.
    nameable = {path for path in wanted if not any(matches(other, [path]) for other in others)}
    assert nameable <= {path for path in paths if matches(path, names)} <= wanted
    for name in names:
        if "." in name:
            assert any(matches(other, [name.partition(".")[2]]) for other in others)


# Explicit targets.

EXPLICIT = {
    "a list": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "a longer entry": {"target_modules": ["0.self_attn.k_proj", "mlp.up_proj"], "feedforward_modules": ["mlp.up_proj"]},
    "a whole path": {"target_modules": ["model.layers.1.mlp.up_proj"], "feedforward_modules": []},
    "no partial component": {"target_modules": ["proj", "v_proj"], "feedforward_modules": []},
    "an expression": {"target_modules": r"model\.layers\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"},
    "an expression and a list": {"target_modules": r".*\.(k|down)_proj", "feedforward_modules": ["down_proj"]},
    "a list and an expression": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": r".*\.1\..*down.*"},
    "exclude a list": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "exclude_modules": ["v_proj", "1.mlp.down_proj"],
    },
    "exclude an expression": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "exclude_modules": r".*layers\.0.*",
    },
    "beside a module to save": {
        "target_modules": ["k_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "modules_to_save": ["mlp"],
    },
    "the output layer": {"target_modules": ["lm_head", "k_proj"], "feedforward_modules": []},
}


@pytest.mark.parametrize("case", EXPLICIT)
def test_explicit_targets_are_pefts(case, llama):
    ours = chosen(llama, **EXPLICIT[case])
    assert ours == chosen_by_peft(llama, **EXPLICIT[case])
    assert 0 < len(ours) < 15


def test_a_literal_choice(llama):
    """The oracle agrees with a human, too."""
    assert chosen(llama, **EXPLICIT["an expression"]) == {
        "model.layers.1.self_attn.k_proj": False,
        "model.layers.1.mlp.down_proj": True,
    }


def test_feedforward_entries_match_whole_components():
    """PEFT's `endswith` without a dot takes `wo` for an `o`; the vector would be on the wrong side."""
    fields = {"target_modules": ["o", "wo"], "feedforward_modules": ["o"]}
    ours = chosen(tiny.build("t5"), **fields)
    assert ours and all(feedforward is path.endswith(".o") for path, feedforward in ours.items())
    assert chosen_by_peft(tiny.build("t5"), **fields) != ours


def test_without_feedforward_modules_the_architecture_says(llama):
    assert chosen(llama, target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.1\..*") == {
        "model.layers.0.self_attn.q_proj": False,
        "model.layers.0.mlp.down_proj": True,
    }


def test_targets_come_in_the_models_order_and_know_their_sides(llama):
    targets = resolve(llama, IA3Config(target_modules=["down_proj", "k_proj"])).targets
    order = [name for name, _ in llama.named_modules()]
    assert [target.path for target in targets] == sorted((target.path for target in targets), key=order.index)
    assert {target.path.rpartition(".")[2]: target.feedforward for target in targets} == {
        "k_proj": False,
        "down_proj": True,
    }
    assert all(target.module is llama.get_submodule(target.path) for target in targets)


def test_an_adapted_models_modules_have_the_names_of_the_base(llama):
    before = {path: type(module) for path, module in base_modules(llama).items()}
    assert list(before) == [name for name, _ in llama.named_modules() if name]
    ia3.get_peft_model(llama, IA3Config(modules_to_save=["lm_head"]))
    assert {path: type(module) for path, module in base_modules(llama).items()} == before


@pytest.mark.parametrize("arch", tiny.NAMES)
def test_all_linear_is_pefts(arch):
    fields = {
        "target_modules": "all-linear",
        "feedforward_modules": tiny.TARGETS[arch][1],
        "task_type": tiny.TASKS[arch],
    }
    ours = chosen(tiny.build(arch), **fields)
    theirs = chosen_by_peft(tiny.build(arch), **fields)
    assert set(ours) == set(theirs)
    assert not any(name in path for path in ours for name in ("lm_head", "classifier"))
    assert len(ours) >= 4 * tiny.LAYERS


def test_all_linear_knows_the_second_feedforward(llama):
    ours = chosen(llama, target_modules="all-linear")
    assert Counter(path.rpartition(".")[2] for path in ours) == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], tiny.LAYERS
    )
    assert {path.rpartition(".")[2] for path, feedforward in ours.items() if feedforward} == {"down_proj"}


def test_all_linear_leaves_a_saved_output_layer_alone(llama):
    model = ia3.get_peft_model(llama, IA3Config(modules_to_save=["lm_head"]))
    assert not any("lm_head" in path for path in chosen(model.model, target_modules="all-linear"))


def test_all_linear_beside_another_adapter_is_the_same(llama):
    alone = chosen(llama, target_modules="all-linear")
    model = ia3.get_peft_model(llama, IA3Config(target_modules=["lm_head", "k_proj"]))
    assert chosen(model.model, target_modules="all-linear") == alone


# What cannot be.


@pytest.mark.parametrize("targets", [["no_such", "proj"], "k_proj", []])
def test_nothing_matched_lists_modules_that_exist(targets, llama):
    with pytest.raises(ValueError, match="No module matches the target_modules") as error:
        resolve(llama, IA3Config(target_modules=targets, feedforward_modules=None))
    message = one_line(error)
    assert all(f"'{name}'" in message for name in ("k_proj", "v_proj", "down_proj", "lm_head"))
    assert repr(sorted(targets) if isinstance(targets, list) else targets) in message


@pytest.mark.parametrize(("excluded", "shown"), [(["k_proj"], "{'k_proj'}"), (".*proj", "'.*proj'")])
def test_everything_excluded_is_refused(excluded, shown, llama):
    with pytest.raises(ValueError, match="exclude_modules leaves none") as error:
        resolve(llama, IA3Config(target_modules=["k_proj"], exclude_modules=excluded))
    message = one_line(error)
    assert "['k_proj']" in message and f"exclude_modules {shown}" in message and "'down_proj'" in message


@pytest.mark.parametrize(("name", "kind"), [("0.input_layernorm", "LlamaRMSNorm"), ("0.mlp", "LlamaMLP")])
def test_a_module_that_cannot_be_rescaled_is_named(name, kind, llama):
    with pytest.raises(InputError) as error:
        resolve(llama, IA3Config(target_modules=[name, "k_proj"], feedforward_modules=[]))
    message = one_line(error)
    assert f"'model.layers.{name}'" in message and kind in message


class Plain(torch.nn.Module):
    """A model that is not transformers'."""

    def __init__(self):
        super().__init__()
        self.k_proj = torch.nn.Linear(3, 4)
        self.v_proj = torch.nn.Linear(3, 4)

    def forward(self, x):
        return self.k_proj(x) + self.v_proj(x)


def elsewhere():
    """A model whose architecture transformers does not register."""
    model = tiny.build("llama")
    model.config.model_type = "elsewhere"
    return model


@pytest.mark.parametrize(("build", "shown"), [(elsewhere, "'elsewhere'"), (Plain, "None")])
@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, "target_modules"),
        ({"feedforward_modules": ["v_proj"]}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "feedforward_modules"),
        ({"target_modules": "all-linear"}, "feedforward_modules"),
    ],
)
def test_an_unknown_architecture_has_no_default(build, shown, fields, asked):
    with pytest.raises(ValueError, match=f"specify `{asked}`") as error:
        resolve(build(), IA3Config(**fields))
    message = one_line(error)
    assert shown in message and "'k_proj'" in message and "does not register it" in message


@pytest.mark.parametrize("build", [elsewhere, Plain])
def test_an_unknown_architecture_with_explicit_modules(build):
    ours = chosen(build(), target_modules=["k_proj", "v_proj"], feedforward_modules=["v_proj"])
    assert ours and all(feedforward is path.endswith("v_proj") for path, feedforward in ours.items())


# Defaults: keys, values and the second feed-forward projection's input.

_DECODER = {"self_attn.k_proj": False, "self_attn.v_proj": False}
_GATED = {f"layers.N.{name}": side for name, side in {**_DECODER, "mlp.down_proj": True}.items()}
_BERT = {
    "encoder.layer.N.attention.self.key": False,
    "encoder.layer.N.attention.self.value": False,
    "encoder.layer.N.output.dense": True,
}
_BART = {
    **{f"{side}.layers.N.self_attn.{name}": False for side in ("encoder", "decoder") for name in ("k_proj", "v_proj")},
    "decoder.layers.N.encoder_attn.k_proj": False,
    "decoder.layers.N.encoder_attn.v_proj": False,
    "encoder.layers.N.fc2": True,
    "decoder.layers.N.fc2": True,
}
_T5 = {
    **{f"{side}.block.N.layer.N.SelfAttention.{name}": False for side in ("encoder", "decoder") for name in "kv"},
    "decoder.block.N.layer.N.EncDecAttention.k": False,
    "decoder.block.N.layer.N.EncDecAttention.v": False,
    "encoder.block.N.layer.N.DenseReluDense.wo": True,
    "decoder.block.N.layer.N.DenseReluDense.wo": True,
}
DEFAULTS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"), _GATED),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    **dict.fromkeys(("bart", "mbart"), _BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "gpt2": {"h.N.attn.c_attn": False, "h.N.mlp.c_proj": True},
    "opt": {
        "decoder.layers.N.self_attn.k_proj": False,
        "decoder.layers.N.self_attn.v_proj": False,
        "decoder.layers.N.fc2": True,
    },
}
_FAMILY = {
    **dict.fromkeys(("roberta", "xlm-roberta"), "bert"),
    "mbart": "bart",
    **dict.fromkeys(("mt5", "umt5"), "t5"),
    **{name: "llama" for name, paths in DEFAULTS.items() if paths is _GATED},
}


def build_default(model_type: str, **sizes) -> torch.nn.Module:
    """The bare tiny model of any architecture that has a default."""
    extra = {"head_dim": 8} if "gemma" in model_type or model_type == "qwen3" else {}
    family = _FAMILY.get(model_type, model_type)
    config = transformers.AutoConfig.for_model(
        model_type, **{"vocab_size": tiny.VOCAB, "pad_token_id": 0, **tiny.SIZES[family], **extra, **sizes}
    )
    return transformers.AutoModel.from_config(config)


def numberless(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", path)


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_defaults_are_keys_values_and_the_second_feedforward(model_type):
    model = build_default(model_type)
    resolved = resolve(model, IA3Config())
    targets = {target.path: target.feedforward for target in resolved.targets}
    assert Counter(map(numberless, targets)) == dict.fromkeys(DEFAULTS[model_type], tiny.LAYERS)
    assert {numberless(path): side for path, side in targets.items()} == DEFAULTS[model_type]
    # PEFT reads in the completed config what we meant.
    fields = {key: sorted(getattr(resolved.config, key)) for key in ("target_modules", "feedforward_modules")}
    assert chosen_by_peft(model, **fields) == targets


@pytest.mark.parametrize("arch", tiny.NAMES)
def test_defaults_are_the_same_under_a_head(arch):
    targets = chosen(tiny.build(arch), task_type=tiny.TASKS[arch])
    bare = {
        path.removeprefix("model.").removeprefix("bert.").removeprefix("transformer."): s for path, s in targets.items()
    }
    assert Counter(map(numberless, bare)) == dict.fromkeys(DEFAULTS[arch], tiny.LAYERS)


def test_bert_attention_output_is_not_touched_at_any_depth():
    """With more than ten layers, `0.output.dense` must not name the tenth's, nor an attention's output."""
    model = build_default("bert", num_hidden_layers=12)
    resolved = resolve(model, IA3Config())
    config, targets = resolved.config, {target.path: target.feedforward for target in resolved.targets}
    assert {path for path, feedforward in targets.items() if feedforward} == {
        f"encoder.layer.{i}.output.dense" for i in range(12)
    }
    assert not any(path.endswith("attention.output.dense") for path in targets)
    assert (
        chosen_by_peft(model, target_modules=config.target_modules, feedforward_modules=config.feedforward_modules)
        == targets
    )


def test_defaults_cover_cross_attention_of_a_bert_decoder():
    model = build_default("bert", is_decoder=True, add_cross_attention=True)
    counts = Counter(map(numberless, chosen(model)))
    assert counts == dict.fromkeys(
        [*_BERT, "encoder.layer.N.crossattention.self.key", "encoder.layer.N.crossattention.self.value"], tiny.LAYERS
    )


def test_a_key_without_a_value_beside_it_is_no_attention():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(model_type="bert")
            self.attention = torch.nn.ModuleDict({"key": torch.nn.Linear(3, 4), "value": torch.nn.Linear(3, 4)})
            self.memory = torch.nn.ModuleDict({"key": torch.nn.Linear(3, 4)})
            self.value = torch.nn.Linear(3, 4)

    assert chosen(Net()) == {"attention.key": False, "attention.value": False}


def test_defaults_with_exclusions(llama):
    config = IA3Config(exclude_modules=r".*layers\.0\..*")
    assert [target.path for target in resolve(llama, config).targets] == [
        f"model.layers.1.{name}" for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_outputs_only_is_pefts_choice_for_mt5():
    """The config of PEFT's example for sequence-to-sequence models."""
    model = build_default("mt5", feed_forward_proj="gated-gelu")
    targets = chosen(model, feedforward_modules=[])
    assert {path.rpartition(".")[2] for path in targets} == {"k", "v", "wi_1"}
    assert chosen_by_peft(model, feedforward_modules=[]) == targets


def test_an_input_that_is_left_out_moves_to_the_other_factor(llama):
    targets = chosen(llama, feedforward_modules=["0.mlp.down_proj"])
    inner = {path.removeprefix("model.layers."): side for path, side in targets.items() if ".mlp." in path}
    assert inner == {"0.mlp.down_proj": True, "1.mlp.up_proj": False}
    assert all(".mlp." not in path for path in chosen(llama, feedforward_modules=[], exclude_modules=["up_proj"]))


@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert", "opt"])
def test_without_a_gate_no_output_will_do(arch):
    model = tiny.build(arch)
    with pytest.raises(InputError, match=r"leaves out '.*(c_proj|wo|output\.dense|fc2)'") as error:
        chosen(model, feedforward_modules=[])
    name = re.search(r"exclude '(\w+)'", one_line(error))[1]
    assert set(chosen(model, feedforward_modules=[], exclude_modules=[name]).values()) == {False}


@pytest.mark.parametrize("pattern", [["up_proj"], ["down_proj", "fc9"], r".*\.fc9"])
def test_feedforward_names_beside_the_default_are_refused(pattern, llama):
    with pytest.raises(InputError, match="default targets are 'down_proj', 'k_proj', 'v_proj'; name target_modules"):
        chosen(llama, feedforward_modules=pattern)


# The completed config.

COMPLETED = {
    "default": ("llama", {}),
    "default, fused": ("gpt2", {}),
    "default, deep names": ("bert", {}),
    "default, encoder-decoder": ("t5", {}),
    "default with exclusions": ("llama", {"exclude_modules": r".*layers\.0\..*"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear, fused": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear, deep names": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "a list": ("bart", {"target_modules": ["q_proj", "fc2"]}),
    "an expression": ("opt", {"target_modules": r".*\.1\..*(q_proj|fc1|fc2)"}),
    "an expression for one name on two sides": ("gpt2", {"target_modules": r".*\.c_proj"}),
    "a name on two sides": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "a name on two sides, deep names": ("bert", {"target_modules": ["key", "dense"], "task_type": "SEQ_CLS"}),
    "feed-forwards by a longer name": ("llama", {"feedforward_modules": ["mlp.down_proj"]}),
    "feed-forwards by an expression": ("llama", {"feedforward_modules": r".*mlp\.down_proj"}),
    "outputs only": ("llama", {"feedforward_modules": []}),
    "outputs only but in one layer": ("llama", {"feedforward_modules": ["0.mlp.down_proj"]}),
    "keys and values only": ("gpt2", {"feedforward_modules": [], "exclude_modules": ["mlp.c_proj"]}),
}


@pytest.mark.parametrize("case", COMPLETED)
def test_a_completed_config_means_what_was_resolved(case):
    """Otherwise a checkpoint could not be read again, by us or by PEFT."""
    arch, fields = COMPLETED[case]
    resolved = resolve(tiny.build(arch), IA3Config(**fields))
    config, targets = resolved.config, {target.path: target.feedforward for target in resolved.targets}
    again = resolve(tiny.build(arch), IA3Config.from_dict(config.to_dict()))
    assert {target.path: target.feedforward for target in again.targets} == targets
    assert again.config == config
    theirs = peft.IA3Config(**config.to_dict())
    adapted = peft.get_peft_model(tiny.build(arch), theirs)
    assert {
        name.removeprefix("base_model.model."): module.is_feedforward
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.ia3.IA3Layer)
    } == targets


@pytest.mark.parametrize("fields", [{}, {"task_type": "SEQ_CLS", "fan_in_fan_out": True}, {"modules_to_save": ["no"]}])
def test_resolving_leaves_the_config_as_it_is(fields):
    """A model completes the config that it takes, as PEFT does, but only if the adapter fits."""
    config, expected = IA3Config(**fields), IA3Config(**fields)
    model = tiny.build("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (resolve, ia3.get_peft_model):
            assert vars(config) == vars(expected)
            with pytest.raises(InputError) if "modules_to_save" in fields else contextlib.nullcontext():
                call(model, config)
    assert (vars(config) == vars(expected)) is ("modules_to_save" in fields)


@pytest.mark.parametrize(
    ("arch", "given", "corrected", "kind"), [("gpt2", False, True, "Conv1D"), ("llama", True, False, "torch.nn.Linear")]
)
def test_fan_in_fan_out_is_corrected_with_pefts_warning(arch, given, corrected, kind):
    texts = []
    for library in (ia3, peft):
        targets, feedforward = tiny.TARGETS[arch]
        config = library.IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=given)
        with pytest.warns(UserWarning, match="fan_in_fan_out") as caught:
            library.get_peft_model(tiny.build(arch), config)
        texts.append(str(caught[0].message))
        assert config.fan_in_fan_out is corrected
    assert texts[0] == texts[1]
    assert kind in texts[0]


@pytest.mark.parametrize(("arch", "right"), [("gpt2", True), ("llama", False)])
def test_a_right_fan_in_fan_out_gives_no_warning(arch, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved = resolve(tiny.build(arch), IA3Config(fan_in_fan_out=right))
    assert resolved.config.fan_in_fan_out is right


# GPT-2's fused projection: [queries | keys | values].

QUERY = slice(0, tiny.HIDDEN)
REST = slice(tiny.HIDDEN, 3 * tiny.HIDDEN)


def fused(model):
    return [layer for path, layer in model.ia3_layers.items() if path.endswith("attn.c_attn")]


def outputs_of(model, modules):
    """What each of the modules returns in a forward pass."""
    found, hooks = [], []
    for module in modules:
        hooks.append(module.register_forward_hook(lambda _module, _args, result: found.append(result.detach())))
    tiny.logits(model, "gpt2")
    for hook in hooks:
        hook.remove()
    return found


def test_the_query_slice_is_never_rescaled_by_default(gpt2):
    before = outputs_of(gpt2, [gpt2.transformer.h[0].attn.c_attn])[0]
    model = ia3.get_peft_model(gpt2, IA3Config())
    tiny.randomize(model)  # the whole parameter, the query slice too
    layer = fused(model)[0]
    after = outputs_of(model, [layer])[0]
    assert torch.equal(after[..., QUERY], before[..., QUERY])
    torch.testing.assert_close(after[..., REST], before[..., REST] * layer.ia3_l["default"].flatten()[REST])
    assert not torch.allclose(after[..., REST], before[..., REST])
    merged = model.merge_and_unload().transformer.h[0].attn.c_attn
    base = tiny.build("gpt2").transformer.h[0].attn.c_attn
    assert torch.equal(merged.weight[:, QUERY], base.weight[:, QUERY])
    assert torch.equal(merged.bias[QUERY], base.bias[QUERY])
    assert not torch.allclose(merged.weight[:, REST], base.weight[:, REST])


@pytest.mark.parametrize("gathered", [False, True])
def test_the_query_slice_is_stored_as_ones(gathered, gpt2, tmp_path):
    """Also with random vectors, and also when a trainer hands in the model's gathered state."""
    model = ia3.get_peft_model(gpt2, IA3Config(init_ia3_weights=False))
    tensors = ia3.get_peft_model_state_dict(model, model.state_dict() if gathered else None)
    stored = [value for key, value in tensors.items() if "c_attn" in key]
    assert len(stored) == tiny.LAYERS
    for value in stored:
        assert value.shape == (3 * tiny.HIDDEN, 1)
        assert torch.equal(value[QUERY], torch.ones(tiny.HIDDEN, 1))
        assert not (value[REST] == 1).any()


def test_the_query_slice_gets_no_gradient(gpt2):
    model = ia3.get_peft_model(gpt2, IA3Config(init_ia3_weights=False))
    model(**tiny.batch("gpt2")).loss.backward()
    for layer in fused(model):
        gradient = layer.ia3_l["default"].grad
        assert torch.equal(gradient[QUERY], torch.zeros(tiny.HIDDEN, 1))
        assert (gradient[REST] != 0).all()


def test_explicit_targets_rescale_the_full_width_as_peft_does():
    """Rescaled queries change the outputs: other keys' scores."""
    ours, theirs = (tiny.adapt("gpt2", library) for library in (ia3, peft))
    assert all(held.mask is None for layer in fused(ours) for held in layer.held.values())
    assert tiny.relative_error(tiny.logits(ours, "gpt2"), tiny.logits(theirs, "gpt2")) < 1e-6
    ours(**tiny.batch("gpt2")).loss.backward()
    theirs(**tiny.batch("gpt2")).loss.backward()
    expected = tiny.adapter_parameters(theirs)
    for name, parameter in tiny.adapter_parameters(ours).items():
        assert (parameter.grad != 0).all()
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_cross_attention_of_gpt2_is_rescaled_whole():
    """Its `c_attn` makes keys and values alone; `q_attn` makes the queries and is left alone."""
    targets = {
        target.path: target for target in resolve(tiny.build("gpt2", add_cross_attention=True), IA3Config()).targets
    }
    assert Counter(map(numberless, targets)) == dict.fromkeys(
        [f"transformer.h.N.{name}" for name in ("attn.c_attn", "crossattention.c_attn", "mlp.c_proj")], tiny.LAYERS
    )
    for path, target in targets.items():
        if "crossattention" in path:
            assert target.module.weight.shape[1] == 2 * tiny.HIDDEN and target.rescaled is None
        elif path.endswith("attn.c_attn"):
            assert target.rescaled.tolist() == [False] * tiny.HIDDEN + [True] * 2 * tiny.HIDDEN


def test_a_config_can_be_used_for_a_second_model():
    config = IA3Config()
    masks = [
        [
            {name for name, held in layer.held.items() if held.mask is not None}
            for layer in fused(ia3.get_peft_model(tiny.build("gpt2", seed), config))
        ]
        for seed in (0, 1)
    ]
    assert masks[0] == masks[1] == [{"default"}] * tiny.LAYERS
