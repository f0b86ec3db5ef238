"""The package has the numbers of `examples/reference.py`, which is written from the paper and imports nothing of ours."""

import runpy

import pytest
import torch
import transformers

from ia3 import IA3Config, IA3Model, Member, Recipe, Task, TFewTrainer, predict, score_choices, tfew_loss
from ia3.scoring.batch import normalized_scores
from support import tiny, words
from support.paths import ROOT

FILE = ROOT / "examples" / "reference.py"

# Of different lengths in tokens.
CHOICES = {"pos": " good", "neg": " not good", "fine": " fine or not bad"}
ROWS = [
    {"text": "the tea was lovely today", "label": "pos"},
    {"text": "the soup was stale", "label": "neg"},
    {"text": "a cake , and it is fresh", "label": "pos"},
    {"text": "it was tea", "label": "fine"},
]
TASK = Task(template="review : {{ text }} answer :", choices={name: text.strip() for name, text in CHOICES.items()})


@pytest.fixture
def reference(monkeypatch):
    """The page as a namespace; one that is asked about the toy task."""
    page = runpy.run_path(str(FILE))
    monkeypatch.setitem(page["losses"].__globals__, "PROMPT", "review : {text} answer :")
    monkeypatch.setitem(page["losses"].__globals__, "CHOICES", CHOICES)
    return page


@pytest.fixture(params=["llama", "t5"])
def both(request, reference):
    """A model with the page's vectors, the same one with ours, and the tokenizer."""
    name = request.param
    theirs, base = (tiny.build(name) for _ in range(2))
    vectors = reference["add_vectors"](theirs)
    ours = IA3Model(base, IA3Config(task_type=tiny.TASKS[name]))
    tokenizer = words.tokenizer() if name == "llama" else words.closing()
    return theirs, vectors, ours, tokenizer


def randomize(vectors, ours):
    """Give both the same random vectors."""
    tiny.randomize(ours)
    for path, vector in vectors.items():
        vector.data.copy_(ours.ia3_layers[path].ia3_l["default"].detach().flatten())


def log_probs(reference, model, tokenizer, row):
    prompt = TASK.prompt(row)
    return [reference["token_log_probs"](model, tokenizer, prompt, choice) for choice in CHOICES.values()]


def test_the_page_is_short_and_imports_nothing_of_ours():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 180
    assert "ia3" not in [
        line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))
    ]


def test_the_vectors_are_where_the_paper_has_them(both):
    _, vectors, ours, _ = both
    assert {path: vector.numel() for path, vector in vectors.items()} == {
        path: layer.ia3_l["default"].numel() for path, layer in ours.ia3_layers.items()
    }


def test_vectors_change_a_models_output_alike(both):
    theirs, vectors, ours, _ = both
    name = theirs.config.model_type
    with torch.no_grad():
        before = theirs(**tiny.batch(name)).logits
        assert torch.equal(before, tiny.build(name)(**tiny.batch(name)).logits)
        randomize(vectors, ours)
        found = theirs(**tiny.batch(name)).logits
        assert tiny.relative_error(found, before) > 0.01
        torch.testing.assert_close(found, ours(**tiny.batch(name)).logits, rtol=1e-5, atol=1e-5)


def test_scores(both, reference):
    theirs, vectors, ours, tokenizer = both
    randomize(vectors, ours)
    prompts = [TASK.prompt(row) for row in ROWS]
    found = score_choices(ours, tokenizer, prompts, [[*CHOICES.values()]] * len(ROWS))
    for row, scores in zip(ROWS, found, strict=True):
        expected = torch.stack([reference["score"](each) for each in log_probs(reference, theirs, tokenizer, row)])
        torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-5)


def test_probabilities_and_the_prediction(both, reference):
    theirs, vectors, ours, tokenizer = both
    randomize(vectors, ours)
    for row, found in zip(ROWS, predict(ours, tokenizer, TASK, ROWS), strict=True):
        expected = reference["predict"](theirs, tokenizer, row["text"])
        assert found.probabilities == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert found.label == max(expected, key=expected.get)


def test_losses(both, reference):
    theirs, vectors, ours, tokenizer = both
    randomize(vectors, ours)
    padded = torch.zeros(len(ROWS), len(CHOICES), 8)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        for j, found in enumerate(log_probs(reference, theirs, tokenizer, row)):
            padded[i, j, : len(found)], mask[i, j, : len(found)] = found.detach(), True
    labels = torch.tensor([[*CHOICES].index(row["label"]) for row in ROWS])
    found = tfew_loss(padded, mask, labels)
    each = [reference["losses"](theirs, tokenizer, row["text"], row["label"]) for row in ROWS]
    expected = torch.stack([torch.stack(terms) for terms in each]).mean(0).detach()
    torch.testing.assert_close(torch.stack(found[1:]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, expected.sum(), rtol=1e-5, atol=1e-5)
    assert normalized_scores(padded, mask).shape == (len(ROWS), len(CHOICES))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_training(both, reference, steps, tmp_path):
    """One step, whose rate is 0; two, the second at the highest rate; five, with all of the schedule."""
    theirs, vectors, ours, tokenizer = both
    examples = [(row["text"], row["label"]) for row in ROWS]
    reference["train"](theirs, tokenizer, vectors, examples, steps)
    arguments = Recipe.paper().changed(steps=steps).training_arguments(tmp_path, save_strategy="no", disable_tqdm=True)
    TFewTrainer(ours, arguments, tokenizer, Member(TASK, ROWS)).train()
    for path, vector in vectors.items():
        found = ours.ia3_layers[path].ia3_l["default"].detach().flatten()
        torch.testing.assert_close(found, vector.detach(), rtol=1e-5, atol=1e-5)
    moved = torch.cat([vector.detach() - 1 for vector in vectors.values()]).abs().max().item()
    assert moved > 2e-3 if steps > 1 else moved == 0


@pytest.mark.parametrize("steps", [7, 100, 1000])
def test_the_schedule(reference, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], 3e-3)
    warmup = Recipe.paper().changed(steps=steps).training_arguments("unused").get_warmup_steps(steps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert [reference["learning_rate"](step, steps) for step in range(steps)] == pytest.approx(found)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_page_runs(name, reference, tmp_path, capsys):
    tiny.build(name).save_pretrained(tmp_path)
    (words.tokenizer() if name == "llama" else words.closing()).save_pretrained(tmp_path)
    page = runpy.run_path(str(FILE))
    page["main"](str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("numbers to train") and lines[1].startswith("before: {'positive': 0.")
    assert lines[1].split(": ", 1)[1] != lines[2].split(": ", 1)[1]
