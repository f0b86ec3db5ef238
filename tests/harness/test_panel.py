"""All adapters answer what one is asked; the harness itself is not needed here."""

import pytest
import torch

from ia3 import IA3Model, InputError, load_base
from ia3.harness.panel import Generation, Likelihood, Panel, names_of
from support import tiny, words
from support.panels import KINDS

TOKENS = words.tokenizer()


def tokens(text: str) -> tuple[int, ...]:
    return tuple(TOKENS(text)["input_ids"])


TEXTS = ["the tea was lovely today", "soup", "it was a stale cake and the tea was bitter today"]
REQUESTS = [
    Likelihood(tokens(f"{text} question : good or bad ? answer :"), tokens(answer), len(tokens(text)))
    for text in TEXTS
    for answer in ("good", "not good", "bad tea today", "good")
]


def adapted(place, name):
    """The model with one adapter, and the arguments of its passes for a question at a place."""
    base, _ = load_base(str(place / "model"))
    if name == "__base__":
        return base, lambda read: {}
    model = IA3Model.from_pretrained(base, place / "adapters" / name)
    return model, lambda read: {"acts_from": [read]} if KINDS[name] == "question" else {}


def one_by_one(place, name, request):
    model, where = adapted(place, name)
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        logits = model(input_ids=ids, **where(request.read)).logits[0, len(request.context) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(request.continuation)
    return float(logits.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())


@pytest.fixture
def panel(place):
    return Panel(str(place / "model"), f"__base__|{place / 'adapters'}", device="cpu")


def names(place):
    return {"__base__": "__base__", **{str(place / "adapters" / name): name for name in KINDS}}


def test_each_answers_as_it_does_alone(place, panel):
    assert panel.waits and set(panel.names) == set(names(place))
    for name, folder in names(place).items():
        found = panel.likelihoods(name, REQUESTS)
        expected = [one_by_one(place, folder, request) for request in REQUESTS]
        torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], atol=1e-4, rtol=0)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_gives_is_told_apart(place, panel):
    """The adapters generate, and are asked about what they have generated."""
    context = tokens("the tea was stale today question : good or bad ? answer :")
    for name, folder in names(place).items():
        model, where = adapted(place, folder)
        ids = torch.tensor([context])
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "max_new_tokens": 5,
            "eos_token_id": None,
        }
        made = tuple(model.generate(ids, **where(5), **options)[0, len(context) :].tolist())
        other = (*made[:-1], (made[-1] + 1) % len(TOKENS))
        found = panel.likelihoods(name, [Likelihood(context, its, 5) for its in (made, other)])
        assert [greedy for _, greedy in found] == [True, False]
        [text] = panel.texts(name, [Generation(context, (), 5, 5)])
        assert text == TOKENS.decode(made, skip_special_tokens=True)


def test_texts_are_those_of_each_alone_and_end_at_stop_texts(place, panel):
    contexts = [tokens(f"{text} answer :") for text in TEXTS]
    reads = [len(tokens(text)) for text in TEXTS]
    long = [Generation(context, (), 12, read) for context, read in zip(contexts, reads, strict=True)]
    ended = False
    for name, folder in names(place).items():
        whole = panel.texts(name, long)
        for context, read, text in zip(contexts, reads, whole, strict=True):
            model, where = adapted(place, folder)
            ids = torch.tensor([context])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, **where(read)
            )
            assert text == TOKENS.decode(made[0, len(context) :], skip_special_tokens=True)
        stop = whole[0].split()[2]
        [short] = panel.texts(name, [long[0]._replace(until=(stop,))])
        assert whole[0].startswith(short) and stop in short
        ended |= len(short) < len(whole[0])
    assert ended


def test_one_question_is_asked_once_for_all(place, panel, monkeypatch):
    asked = []
    score = panel._scorer.likelihoods
    monkeypatch.setattr(panel._scorer, "likelihoods", lambda questions: asked.extend(questions) or score(questions))
    each = [panel.likelihoods(name, REQUESTS) for name in panel.names]
    # Twelve requests of three contexts, in which an answer stands twice.
    assert len(asked) == 3 * len(panel.names) and {len(one.choices) for one in asked} == {3}
    assert len({tuple(map(tuple, found)) for found in each}) == len(panel.names)
    assert not panel._kept  # all have asked
    more = Likelihood(REQUESTS[0].context, tokens("bitter"), 5)
    panel.likelihoods(panel.names[0], [REQUESTS[0], more])
    panel.likelihoods(panel.names[1], [more])
    assert len(asked) == 4 * len(panel.names)


def test_texts_before_a_question_are_read_once_for_all_that_act_from_there_on(place, monkeypatch):
    from ia3.scoring import scorer

    made = []

    class Counted(scorer.Readings):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(scorer, "Readings", Counted)
    asks = str(place / "adapters" / "asks")
    panel = Panel(str(place / "model"), ["__base__", asks], device="cpu")
    text = "the tea was lovely today " * 40
    requests = [Likelihood(tokens(text + question), tokens("good"), 200) for question in ("good ?", "bad ?")]
    found = panel.likelihoods(asks, requests)
    assert [one.read for one in made] == [1]
    for request, (score, _) in zip(requests, found, strict=True):
        assert score == pytest.approx(one_by_one(place, "asks", request)[0], abs=1e-4)


def test_the_base_model_alone_has_no_adapters(place):
    panel = Panel(str(place / "model"), "__base__", device="cpu")
    found = panel.likelihoods("__base__", REQUESTS[:2])
    expected = [one_by_one(place, "__base__", request)[0] for request in REQUESTS[:2]]
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-4)


def test_names(place):
    folder = str(place / "adapters")
    assert names_of(["hub/some"]) == {"hub/some": "hub/some"}
    assert [*names_of(f"__base__|{folder}/two|{folder}/one")] == ["__base__", f"{folder}/two", f"{folder}/one"]
    assert [*names_of(folder)] == [f"{folder}/{name}" for name in sorted(KINDS)]
    for wrong in (f"{folder}|{folder}/one", "", "a|", "a|a"):
        with pytest.raises(InputError, match="different adapters"):
            names_of(wrong)
    with pytest.raises(InputError, match="one with adapters, found"):
        names_of(str(place / "model"))


def test_other_models_are_refused(tmp_path):
    tiny.build("t5", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path)
    words.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="causal language model, found T5ForConditionalGeneration"):
        Panel(str(tmp_path), "__base__")
