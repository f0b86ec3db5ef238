"""What `load_base` makes of a checkpoint of each family."""

import pytest
import torch
import transformers

from ia3 import InputError, load_base
from ia3.adapter.pretrained import HEADED, find_base, task_type
from support import tiny, words

LABELS = ["pos", "neg", "none", "other"]


@pytest.fixture
def save(tmp_path):
    """Writes a tiny checkpoint of an architecture, by the class that is named, and its tokenizer."""

    def write(name, kind, **changes):
        config = tiny.config(name, vocab_size=len(words.VOCABULARY))
        for key, value in changes.items():
            setattr(config, key, value)
        getattr(transformers, kind)(config).save_pretrained(tmp_path / "model")
        words.closing().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("gpt2", "GPT2LMHeadModel", "CAUSAL_LM"),
        ("gpt2", "GPT2Model", "CAUSAL_LM"),
        ("llama", "LlamaForCausalLM", "CAUSAL_LM"),
        ("llama", "LlamaForSequenceClassification", "SEQ_CLS"),
        ("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("bart", "BartModel", "SEQ_2_SEQ_LM"),
        ("bart", "BartForSequenceClassification", "SEQ_CLS"),
        ("bert", "BertModel", "FEATURE_EXTRACTION"),
        ("bert", "BertForMaskedLM", "FEATURE_EXTRACTION"),
        ("bert", "BertForSequenceClassification", "SEQ_CLS"),
        ("bert", "BertLMHeadModel", "CAUSAL_LM"),
    ],
)
def test_the_config_says_what_a_model_is(save, name, kind, expected):
    model, tokenizer = load_base(str(save(name, kind)), LABELS)
    assert task_type(model) == expected and not model.training
    assert isinstance(tokenizer.pad_token_id, int)
    if expected in HEADED:
        assert model.config.num_labels == 4 and model.config.id2label == dict(enumerate(sorted(LABELS)))
        assert model.config.label2id["none"] == 1 and model.config.pad_token_id is not None


@pytest.mark.parametrize("kind", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_a_new_head_is_the_same_every_time_and_a_trained_one_is_kept(save, kind):
    path = str(save("bert", "BertModel"))
    state = torch.random.get_rng_state()
    first, _ = load_base(path, LABELS, kind=kind)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    second, _ = load_base(path, LABELS, kind=kind)
    assert tiny.same_bits(second.state_dict(), first.state_dict())
    assert (first.classifier.weight.abs().max() > 0) == (kind == "SEQ_CLS")
    first.classifier.weight.data += 1
    first.save_pretrained(path)
    assert torch.equal(load_base(path, LABELS)[0].classifier.weight, first.classifier.weight)
    assert type(load_base(path, LABELS)[0]) is type(first)
    assert load_base(path, LABELS[:2])[0].classifier.weight.shape == (2, tiny.HIDDEN)


def test_an_encoder_without_labels(save):
    path = str(save("bert", "BertForMaskedLM"))
    with pytest.raises(InputError, match=r"Expected labels for '.*', an encoder \('BertForMaskedLM'\)"):
        load_base(path)


def test_a_damaged_model_is_named_for_what_it_is(save):
    path = save("t5", "T5ForConditionalGeneration")
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="as an encoder-decoder"):
        load_base(str(path))


def test_a_trained_head_keeps_its_order(save, tmp_path):
    model, tokenizer = load_base(str(save("bert", "BertModel")), LABELS)
    order = [LABELS[1], LABELS[3], LABELS[0], LABELS[2]]
    model.config.id2label = dict(enumerate(order))
    model.config.label2id = {label: i for i, label in enumerate(order)}
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    again, _ = load_base(str(tmp_path / "trained"), LABELS)
    assert list(again.config.id2label.values()) == order
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "dtype, found", [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_weights_have_the_dtype_that_is_asked_for(save, dtype, found):
    model, _ = load_base(str(save("llama", "LlamaForCausalLM")), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {found}


def test_a_dtype_that_there_is_not():
    with pytest.raises(InputError, match=r"Expected a dtype of 'auto', .*found 'bf16'; close to it: 'bfloat16'"):
        load_base(dtype="bf16")


class TestAModelOfTheHub:
    def test_is_asked_for_by_its_name(self, monkeypatch):
        monkeypatch.setattr("ia3.adapter.pretrained.hub_answers", lambda: True)
        assert find_base("owner/name") == ("owner/name", "owner/name")

    def test_is_read_from_the_cache_without_a_network(self, tmp_path, monkeypatch):
        folder = tmp_path / "models--owner--name" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (tmp_path / "models--owner--name" / "refs").mkdir()
        (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
        (folder / "config.json").write_text("{}")
        monkeypatch.setattr("ia3.adapter.pretrained.hub_answers", lambda: False)
        assert find_base("owner/name", cache_dir=tmp_path) == ("owner/name", str(folder))

    @pytest.mark.parametrize("name", ["owner/nmae", "no name at all", "a/b/c"])
    def test_that_is_nowhere_is_one_line(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr("ia3.adapter.pretrained.hub_answers", lambda: False)
        with pytest.raises(InputError, match=f"found no {name!r} here, and the hub cannot be reached") as error:
            load_base(name)
        assert "\n" not in str(error.value)


class TestAGGUFFile:
    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        pytest.importorskip("gguf")
        from support import gguf_files

        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "cache"))
        (tmp_path / "models").mkdir()
        self.written = gguf_files.write(tmp_path / "models" / "tiny.gguf")
        return tmp_path / "models" / "tiny.gguf"

    def test_is_a_base_model_by_its_own_name_or_its_folders(self, file, tmp_path):
        ids = torch.arange(3, 12)[None]
        expected = self.written(ids).logits
        link = tmp_path / "link.gguf"
        link.symlink_to(file)
        for name in (file, file.parent, link):
            model, tokenizer = load_base(str(name))
            assert model.name_or_path == str(name)
            assert tiny.relative_error(model(ids).logits, expected) < 0.02  # of 8 bits
            assert tokenizer.decode(tokenizer("a tea")["input_ids"]) == "a tea"
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        copy = next((tmp_path / "cache").glob("tiny-*"))
        stamp = (copy / "model.safetensors").stat().st_mtime_ns
        load_base(str(file))
        assert (copy / "model.safetensors").stat().st_mtime_ns == stamp  # made once

    def test_that_is_replaced_is_read_again(self, file):
        from support import gguf_files

        first, _ = load_base(str(file))
        gguf_files.write(file, seed=1)
        assert not tiny.same_bits(load_base(str(file))[0].state_dict(), first.state_dict())

    def test_is_trained_and_its_adapter_finds_it_again(self, file, tmp_path, monkeypatch):
        import ia3

        base, _ = load_base(str(file))
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
        model(input_ids=torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.adapter_parameters("default"))
        model.save_pretrained(tmp_path / "adapter")
        monkeypatch.chdir(tmp_path / "adapter")
        assert ia3.AdapterFolder(".").config.base == str(file)
        load_base(str(file))

    def test_that_cannot_be_read_is_one_line(self, file, tmp_path, monkeypatch):
        (file.parent / "other.gguf").write_bytes(b"GGUF of no use")
        (file.parent / "notes.txt").write_text("no model")
        for name, said in {
            file.parent: r"or one \.gguf file, found 'other.gguf', 'tiny.gguf' in .*; name the file",
            file.parent / "other.gguf": "Cannot read the GGUF file .*other.gguf",
            file.parent / "notes.txt": r"Expected a model's folder or a \.gguf file, found the file",
            file.parent / "none.gguf": "Expected a model's folder, found no",
        }.items():
            with pytest.raises(InputError, match=said) as error:
                load_base(str(name))
            assert "\n" not in str(error.value)
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
