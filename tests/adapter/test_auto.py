"""An adapter loaded together with the base model that its config names: by ours and PEFT's classes alike."""

import json

import peft
import pytest
import torch
import transformers

import ia3
from ia3 import IA3Config, InputError
from support import tiny, words

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

TOKENS = torch.tensor([[5, 17, 23, 9, 41], [3, 8, 8, 30, 12]])

# class: architecture, base class, task type
CASES = {
    "AutoPeftModelForCausalLM": ("llama", "LlamaForCausalLM", "CAUSAL_LM"),
    "AutoPeftModelForSeq2SeqLM": ("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "AutoPeftModelForSequenceClassification": ("bert", "BertForSequenceClassification", "SEQ_CLS"),
    "AutoPeftModelForTokenClassification": ("bert", "BertForTokenClassification", "TOKEN_CLS"),
    "AutoPeftModelForQuestionAnswering": ("bert", "BertForQuestionAnswering", "QUESTION_ANS"),
    "AutoPeftModelForFeatureExtraction": ("bert", "BertModel", "FEATURE_EXTRACTION"),
    "AutoPeftModel": ("llama", "LlamaForCausalLM", None),
}
classes = pytest.mark.parametrize("name", CASES)


def answer(model) -> torch.Tensor:
    extra = {"decoder_input_ids": TOKENS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **extra)[0]


def saved(name: str, library, folder, **sizes):
    """A base model and an adapter for it in folders of their own; returns the model in memory."""
    arch, kind, task = CASES[name]
    torch.manual_seed(0)
    sizes = {"num_labels": 2, **sizes} if task == "QUESTION_ANS" else sizes
    base = tiny.randomized(getattr(transformers, kind)(tiny.config(arch, **sizes)), 0.1)
    base.save_pretrained(folder / "base")
    base = getattr(transformers, kind).from_pretrained(folder / "base").eval()
    targets, feedforward = tiny.TARGETS[arch]
    config = library.IA3Config(task_type=task, target_modules=targets, feedforward_modules=feedforward)
    model = library.get_peft_model(base, config).eval()
    tiny.randomize(model)
    model.save_pretrained(folder / "adapter")
    return model


def change_config(folder, **values) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


@classes
@pytest.mark.parametrize("library", [ia3, peft], ids=["saved by us", "saved by PEFT"])
def test_an_adapter_brings_its_base_model(name, library, tmp_path):
    expected = answer(saved(name, library, tmp_path))
    for loader in (ia3, peft):
        model = getattr(loader, name).from_pretrained(tmp_path / "adapter").eval()
        assert type(model.get_base_model()).__name__ == CASES[name][1]
        assert tiny.relative_error(answer(model), expected) <= 1e-6
    model = getattr(ia3, name).from_pretrained(tmp_path / "adapter")
    assert isinstance(model, ia3.PeftModel) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    base = getattr(transformers, CASES[name][1]).from_pretrained(tmp_path / "base").eval()
    assert tiny.relative_error(answer(base), expected) > 0.001


@pytest.mark.parametrize("name", [name for name in CASES if name != "AutoPeftModel"])
def test_the_general_class_asks_the_config(name, tmp_path):
    """By its task_type; the special classes load an adapter without one, too."""
    expected = answer(saved(name, ia3, tmp_path))
    model = ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert tiny.relative_error(answer(model), expected) <= 1e-6
    change_config(tmp_path, task_type=None)
    model = getattr(ia3, name).from_pretrained(tmp_path / "adapter")
    assert type(model.model).__name__ == CASES[name][1]


@pytest.mark.parametrize("name", [name for name in CASES if name != "AutoPeftModel"])
def test_another_tasks_adapter_is_refused_with_its_class(name, tmp_path):
    saved(name, ia3, tmp_path)
    for other, (_, _, task) in CASES.items():
        if other in (name, "AutoPeftModel"):
            continue
        with pytest.raises(InputError) as error:
            getattr(ia3, other).from_pretrained(tmp_path / "adapter")
        assert f"use {name}." in one_line(error) and task in str(error.value)


def test_going_on_training(tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    model = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", adapter_name="mine", is_trainable=True)
    assert model.active_adapter == "mine"
    needed = {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad}
    assert needed == set(tiny.adapter_parameters(model, "mine")) and len(needed) == 3 * tiny.LAYERS


def test_keyword_arguments_reach_the_base_model(tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    arguments = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **arguments)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert {p.dtype for p in tiny.adapter_parameters(model).values()} == {torch.float32}
    reference = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **arguments)
    assert torch.equal(answer(model), answer(reference))


def test_an_adapter_in_a_subfolder(tmp_path):
    expected = answer(saved("AutoPeftModelForCausalLM", ia3, tmp_path))
    (tmp_path / "outer").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "outer" / "inner")
    model = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert tiny.relative_error(answer(model), expected) <= 1e-6


def test_a_config_of_ones_own(tmp_path):
    expected = answer(saved("AutoPeftModelForCausalLM", ia3, tmp_path))
    config = IA3Config.from_pretrained(tmp_path / "adapter")
    change_config(tmp_path, base_model_name_or_path="/no/such/folder")
    model = ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=config)
    assert tiny.relative_error(answer(model), expected) <= 1e-6


@pytest.mark.parametrize("none", [None, ""])
def test_an_adapter_without_a_base_model_is_refused(none, tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    change_config(tmp_path, base_model_name_or_path=none)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    message = one_line(error)
    assert "base_model_name_or_path" in message and "PeftModel.from_pretrained" in message


@pytest.mark.parametrize("place", ["{}/gone", "owner/never-downloaded"])
def test_a_base_model_that_is_not_there_is_named(place, tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    gone = place.format(tmp_path)
    change_config(tmp_path, base_model_name_or_path=gone)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert gone in one_line(error)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "base")
    assert "adapter_config.json" in one_line(error)


def test_an_adapter_for_another_base_model_is_refused(tmp_path):
    saved("AutoPeftModelForCausalLM", ia3, tmp_path)
    saved("AutoPeftModelForSequenceClassification", ia3, tmp_path / "other")
    change_config(tmp_path, base_model_name_or_path=str(tmp_path / "other" / "base"))
    with pytest.raises(InputError):
        ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    "mapping",
    [
        None,
        {},
        {"parent_library": "os", "base_model_class": "system"},
        {"parent_library": "transformers_evil.models", "base_model_class": "LlamaForCausalLM"},
        {"base_model_class": "LlamaForCausalLM"},
    ],
)
def test_a_class_outside_transformers_is_not_imported(mapping, tmp_path):
    saved("AutoPeftModel", ia3, tmp_path)
    change_config(tmp_path, auto_mapping=mapping)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert "AutoPeftModelForCausalLM" in one_line(error)


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "transformers.models.no_such.modeling", "base_model_class": "LlamaForCausalLM"},
        {"parent_library": "transformers", "base_model_class": "NoSuchModel"},
    ],
)
def test_a_class_that_transformers_lacks_is_named(mapping, tmp_path):
    saved("AutoPeftModel", ia3, tmp_path)
    change_config(tmp_path, auto_mapping=mapping)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert mapping["base_model_class"] in one_line(error)


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "transformers", "base_model_class": "logging"},
        {"parent_library": "transformers.utils", "base_model_class": "is_torch_available"},
        {"parent_library": "transformers", "base_model_class": "AutoTokenizer"},
    ],
)
def test_what_is_no_models_class_is_refused(mapping, tmp_path):
    saved("AutoPeftModel", ia3, tmp_path)
    change_config(tmp_path, auto_mapping=mapping)
    with pytest.raises(InputError) as error:
        ia3.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert "a model's class" in one_line(error) and mapping["base_model_class"] in str(error.value)


@pytest.mark.parametrize("extra", [0, 3])
def test_embeddings_grow_to_a_tokenizer_beside_the_adapter(extra, tmp_path):
    name, size = "AutoPeftModelForCausalLM", len(words.VOCABULARY)
    saved(name, ia3, tmp_path, vocab_size=size)
    tokenizer = words.tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(extra)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    for library in (ia3, peft):
        model = getattr(library, name).from_pretrained(tmp_path / "adapter")
        assert model.get_input_embeddings().num_embeddings == size + extra
        assert model.get_output_embeddings().out_features == size + extra
        assert model.config.vocab_size == size + extra


def test_embeddings_do_not_shrink(tmp_path):
    name = "AutoPeftModelForCausalLM"
    expected = answer(saved(name, ia3, tmp_path, vocab_size=len(words.VOCABULARY) + 10))
    words.tokenizer().save_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(ia3.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@classes
def test_these_classes_are_not_made_directly(name):
    with pytest.raises(InputError) as error:
        getattr(ia3, name)()
    assert f"{name}.from_pretrained" in one_line(error)
