"""Several adapters in one model, each with modules of its own: switched, deleted, saved and loaded beside PEFT's."""

import warnings

import peft
import pytest
import torch
import transformers

import ia3
from ia3 import IA3Config
from support import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active"),
]

# Keys alone; values with the pooler trained in full (of which PEFT can merge the linear map only); feed-forwards with another head of its own.
ADAPTERS = {
    "first": {"target_modules": ["key"], "feedforward_modules": []},
    "pooled": {"target_modules": ["value"], "feedforward_modules": [], "modules_to_save": ["pooler.dense"]},
    "second": {
        "target_modules": ["output.dense"],
        "feedforward_modules": ["output.dense"],
        "modules_to_save": ["classifier"],
    },
}


def three(library):
    """A classifier with the three adapters; `first` is active. Heads are saved where the adapter says so only."""
    names = iter(ADAPTERS)
    name = next(names)
    config = library.IA3Config(**ADAPTERS[name])
    model = library.get_peft_model(tiny.build("bert"), config, adapter_name=name).eval()
    for name in names:
        model.add_adapter(name, library.IA3Config(**ADAPTERS[name]))
    for seed, name in enumerate(ADAPTERS):
        tiny.randomize(model, seed, name)
    return model


def trainable(model) -> set[str]:
    return {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad}


def test_adapters_with_different_heads_are_switched_as_by_peft():
    ours, theirs = three(ia3), three(peft)
    seen = []
    for name in ("pooled", "second", "first", "second", "pooled"):
        for model in (ours, theirs):
            model.set_adapter(name)
        answer = tiny.logits(ours, "bert")
        assert tiny.relative_error(answer, tiny.logits(theirs, "bert")) <= 1e-6
        assert trainable(ours) == trainable(theirs) == set(tiny.adapter_parameters(ours, name))
        seen.append(answer)
    assert torch.equal(seen[0], seen[4]) and torch.equal(seen[1], seen[3])
    assert min(tiny.relative_error(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_with_different_heads_are_merged_as_by_peft(name):
    ours, theirs = three(ia3), three(peft)
    for model in (ours, theirs):
        model.set_adapter(name)
    expected = tiny.logits(ours, "bert")
    found, wanted = ours.merge_and_unload(), theirs.merge_and_unload()
    assert tiny.relative_error(tiny.logits(found, "bert"), expected) <= 1e-5
    assert set(found.state_dict()) == set(wanted.state_dict()) == set(tiny.build("bert").state_dict())
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[key], rtol=1e-6, atol=1e-9)


def test_two_adapters_with_heads_of_their_own_act_together():
    model = three(ia3)
    model.set_adapter(["pooled", "second"])
    both = tiny.logits(model, "bert")
    single = tiny.build("bert")
    parts = {path: layer for path, layer in model.ia3_layers.items() if "first" not in layer.ia3_l}
    with torch.no_grad():
        for path, layer in parts.items():
            vector = next(iter(layer.ia3_l.values()))
            module = single.get_submodule(path)
            module.weight.mul_(vector)
            if not next(iter(layer.held.values())).feedforward:
                module.bias.mul_(vector.flatten())
        for path, module in model.ia3_trained_modules.items():
            single.get_submodule(path).load_state_dict(next(iter(module.modules_to_save.values())).state_dict())
    assert len(parts) == 3 * tiny.LAYERS  # the feed-forwards of attention are output.dense too
    assert tiny.relative_error(tiny.logits(single, "bert"), both) <= 1e-5


@pytest.mark.parametrize("gone", ADAPTERS)
@pytest.mark.parametrize("active", ADAPTERS)
def test_after_a_deletion_the_formerly_trainable_are_still_frozen(gone, active):
    """An idle or the active one: what becomes active next is trainable, and nothing else."""
    ours, theirs = three(ia3), three(peft)
    left = [name for name in ADAPTERS if name != gone]
    steps = [
        lambda model: model.set_adapter(active),
        lambda model: model.delete_adapter(gone),
        lambda model: model.set_adapter(left[1]),
        lambda model: model.set_adapter(left[0]),
    ]
    for i, step in enumerate(steps):
        for model in (ours, theirs):
            step(model)
        if i != 1 or gone != active:  # PEFT then takes another in each layer
            assert trainable(ours) == trainable(theirs)
            assert tiny.relative_error(tiny.logits(ours, "bert"), tiny.logits(theirs, "bert")) <= 1e-6
    assert trainable(ours) == set(tiny.adapter_parameters(ours, left[0]))


def test_freezing_touches_nothing_that_is_no_adapters():
    """Someone has made a norm trainable, and it stays so, as with PEFT."""
    ours, theirs = three(ia3), three(peft)
    for model in (ours, theirs):
        model.base_model.model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
        for name in ("pooled", "second", "first"):
            model.set_adapter(name)
        model.delete_adapter("second")
    assert trainable(ours) == trainable(theirs)
    assert "bert.embeddings.LayerNorm.weight" in trainable(ours)


@pytest.mark.parametrize("saver", [ia3, peft], ids=["saved by us", "saved by PEFT"])
@pytest.mark.parametrize("loader", [ia3, peft], ids=["loaded by us", "loaded by PEFT"])
def test_several_adapters_are_saved_and_loaded(saver, loader, tmp_path):
    model = three(saver)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(ADAPTERS)
    loaded = None
    for name in ("second", "first", "pooled"):
        if loaded is None:
            loaded = loader.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / name, adapter_name=name)
        else:
            loaded.load_adapter(tmp_path / name, adapter_name=name)
    assert loaded.active_adapter == "second"
    for name in ADAPTERS:
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert tiny.relative_error(tiny.logits(loaded.eval(), "bert"), tiny.logits(model, "bert")) <= 1e-6


@pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])
def test_selected_adapters_are_saved(library, tmp_path):
    three(library).save_pretrained(tmp_path, selected_adapters=["second", "first"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first", "second"]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None])
def test_the_heads_of_tasks_are_pefts(task):
    kinds = {"TOKEN_CLS": "BertForTokenClassification", "QUESTION_ANS": "BertForQuestionAnswering"}

    kind = getattr(transformers, kinds.get(task, "BertForSequenceClassification"))
    needed = []
    for library in (ia3, peft):
        config = library.IA3Config(task_type=task, target_modules=["key"], feedforward_modules=[])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(kind(tiny.config("bert", num_labels=2)), config)
        model.add_adapter("two", library.IA3Config(task_type=task, target_modules=["value"], feedforward_modules=[]))
        model.set_adapter("two")
        needed.append((trainable(model), sorted(set(config.modules_to_save or []))))
    assert needed[0] == needed[1]


def test_all_linear_leaves_out_what_is_excluded_and_the_head():
    fields = {"target_modules": "all-linear", "feedforward_modules": [], "task_type": "SEQ_CLS"}
    excluded = r".*\.layer\.0\..*|.*pooler.*"
    paths = [
        {name.rpartition(".ia3_l")[0] for name, _ in model.named_parameters() if ".ia3_l." in name}
        for model in (
            ia3.get_peft_model(tiny.build("bert"), IA3Config(**fields, exclude_modules=excluded)).model,
            peft.get_peft_model(
                tiny.build("bert"), peft.IA3Config(**fields, exclude_modules=excluded)
            ).base_model.model,
        )
    ]
    assert paths[0] == paths[1]
    assert len(paths[0]) == 6 and all(".layer.1." in path for path in paths[0])
