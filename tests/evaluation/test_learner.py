"""Folds, and adapters that are asked about rows that they were not trained on."""

import sys

import pytest
import torch

from ia3 import IA3Config, IA3Model, InputError, Readings, Recipe, Task, cross_validate, predict
from ia3.evaluation.learner import fold_of_each
from ia3.evaluation.progress import Stage
from support import tiny, words

TASK = Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})


def adapted() -> IA3Model:
    torch.manual_seed(0)
    return IA3Model(tiny.build("llama", vocab_size=len(words.VOCABULARY)), IA3Config(task_type="CAUSAL_LM"))


def test_all_folds_share_the_readings_that_are_given(tmp_path):
    rows = [{"text": f"{row['text']} and the tea", "label": row["label"]} for row in words.rows(8)]
    recipe, readings = Recipe.small().changed(steps=2), Readings()
    cross_validate(adapted(), words.tokenizer(), TASK, rows, recipe, 2, output_dir=tmp_path, readings=readings)
    assert readings.read == len({row["text"] for row in rows})


def test_each_row_is_predicted_by_an_adapter_that_has_not_seen_it(tmp_path, monkeypatch):
    from ia3.training import trainer

    seen = {}

    class Watched(trainer.TFewTrainer):
        def __init__(self, model, args, tokenizer, members, *others, **kwargs):
            seen.update({member.name: [row["text"] for row in member.rows] for member in members})
            super().__init__(model, args, tokenizer, members, *others, **kwargs)

    asked = {}

    def watched(model, tokenizer, task, rows, adapter_names, **kwargs):
        asked.update({row["text"]: name for row, name in zip(rows, adapter_names, strict=True)})
        return predict(model, tokenizer, task, rows, adapter_names=adapter_names, **kwargs)

    monkeypatch.setattr("ia3.training.trainer.TFewTrainer", Watched)
    monkeypatch.setattr(sys.modules["ia3.evaluation.prediction"], "predict", watched)
    model, rows = adapted(), [{**row, "text": f"{row['text']} {i % 7}"} for i, row in enumerate(words.rows(24))]
    rows = list({row["text"]: row for row in rows}.values())
    before = [parameter.clone() for parameter in model.parameters()]
    steps, stage = [], Stage()
    stage.reach = steps.append
    found = cross_validate(model, words.tokenizer(), TASK, rows, Recipe(steps=3), 4, 1, tmp_path, stage)
    assert len(found) == len(rows) == len(asked) and steps == [1, 2, 3]
    assert all(text not in seen[name] for text, name in asked.items())
    assert {len(texts) for texts in seen.values()} <= {len(rows) - len(rows) // 4, len(rows) - len(rows) // 4 - 1}
    again = cross_validate(model, words.tokenizer(), TASK, [*rows, *rows[:5]], Recipe(steps=1), 4)
    assert all(text not in seen[name] for text, name in asked.items())
    for twice, once in zip(again[-5:], again, strict=False):
        assert twice.probabilities == pytest.approx(once.probabilities, abs=1e-6)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_callers_adapters_stay_as_they_are(tmp_path):
    model = adapted()
    for name in ("fold0", "fold2", "idle"):
        model.add_adapter(name, IA3Config(task_type="CAUSAL_LM"))
        tiny.randomize(model, 3, name)
    model.set_adapter(["default", "fold0"], inference_mode=True)  # active and frozen
    model.set_requires_grad("idle")  # trainable and not active
    vector, *_ = model.adapter_parameters("fold2")
    vector.requires_grad_()  # one of several
    model.eval()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    assert {learns for name, (_, learns) in before.items() if name.endswith(".idle")} == {True}
    found = cross_validate(model, words.tokenizer(), TASK, words.rows(12), Recipe(steps=2), 3, 0, tmp_path)
    assert len(found) == 12 and list(model.peft_config) == ["default", "fold0", "fold2", "idle"]
    assert model.active_adapters == ["default", "fold0"] and not model.training
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (value, learns) in before.items():
        assert torch.equal(after[name], value) and after[name].requires_grad == learns, name
    model.set_adapter("default")  # which freezes the others: the model knows that one was trainable
    assert not any(parameter.requires_grad for parameter in model.adapter_parameters("idle"))


def test_a_start_that_is_not_there_leaves_the_callers_adapters(tmp_path):
    model = adapted()
    model.add_adapter("fold1", IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="nowhere"):
        recipe = Recipe(steps=1, init=str(tmp_path / "nowhere"))
        cross_validate(model, words.tokenizer(), TASK, words.rows(12), recipe, 2)
    assert list(model.peft_config) == ["default", "fold1"] and model.active_adapters == ["default"]


def test_folds_are_known_without_a_model():
    rows = [{"text": f"tea {i // 2}", "label": "pos" if i < 12 else "neg"} for i in range(20)]
    found = fold_of_each(TASK, rows, 4, seed=2)
    assert set(found) == {0, 1, 2, 3} and found == fold_of_each(TASK, rows, 4, seed=2)
    assert found != fold_of_each(TASK, rows, 4, seed=3)
    assert all(found[i] == found[i + 1] for i in range(0, 20, 2))  # rows in the same words


def test_answers_tell_rows_apart_where_prompts_do_not():
    task = Task(template="which one ?", choices={"0": "{{ a }}", "1": "{{ b }}"})
    rows = [{"a": f"tea {i}", "b": f"soup {i}", "label": i % 2} for i in range(6)]
    assert set(fold_of_each(task, rows, 3)) == {0, 1, 2}


def test_a_label_that_all_but_one_fold_lack():
    rows = [{"text": "tea", "label": "pos"}, {"text": "soup", "label": "neg"}]
    with pytest.raises(InputError, match=r"at least two labels beside each of 2 folds, .* found only '(pos|neg)'"):
        fold_of_each(TASK, rows, 2)


@pytest.mark.parametrize("folds", [1, 9])
def test_folds_that_cannot_be(tmp_path, folds):
    with pytest.raises(InputError, match="from 2 folds to as many as there are different rows"):
        cross_validate(adapted(), words.tokenizer(), TASK, words.rows(8), Recipe(steps=1), folds)
