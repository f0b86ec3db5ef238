"""Opinions: the weighed sum of log-probabilities, and weights that held-out rows give."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from ia3 import InputError
from ia3.adapter.stored import HEAD_NAME, OPINIONS_NAME, SENTENCES_NAME
from ia3.opinions.head import Head
from ia3.opinions.opinions import Opinions, weigh

HEAD = Head(("a", "b"), (0,), np.ones((2, 1, 3), np.float32), np.zeros(2, np.float32), of=4)

SMALL = Head(("a", "b"), (0,), np.ones((2, 1, 5), np.float32), np.zeros(2, np.float32), of=1)


def opinion(y, right, seed=0, labels=3):
    """Log-probabilities that favour the right label in so many of 100 rows."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(len(y), labels)) / 2
    for row, label in enumerate(y):
        logits[row, label if chance.random() < right else (label + 1) % labels] += 2
    return log_softmax(logits, axis=1)


Y = list(np.arange(90) % 3)


class TestTogether:
    def test_vectors_alone_keep_their_scores(self):
        scores = {"a": -1.5, "b": -0.25}
        assert Opinions().together([scores]) == scores

    def test_weighed_log_probabilities_are_added(self):
        both = Opinions.of({"vectors": 0.5, "head": 2.0}, {"head": HEAD})
        found = both.together([{"a": -3.0, "b": -2.0}], {"head": {"a": math.log(0.9), "b": math.log(0.1)}})
        total = math.log(math.exp(-3) + math.exp(-2))
        assert found == pytest.approx(
            {"a": 0.5 * (-3 - total) + 2 * math.log(0.9), "b": 0.5 * (-2 - total) + 2 * math.log(0.1)}
        )

    def test_a_balance_is_added_to_the_vectors_scores(self):
        balance = [{"a": 0.5, "b": -0.5}]
        found = Opinions.of({"vectors": 2.0, "head": 1.0}, {"head": HEAD}, balance).together(
            [{"a": -1.0, "b": -1.5}], {"head": {"a": -0.7, "b": -0.7}}
        )
        total = math.log(math.exp(-0.5) + math.exp(-2.0))
        assert found == pytest.approx({"a": 2 * (-0.5 - total) - 0.7, "b": 2 * (-2.0 - total) - 0.7})
        alone = Opinions.of({"vectors": 2.0}, balance=balance)
        assert alone.together([{"a": -1.0, "b": -1.5}]) == {"a": -1.0, "b": -4.0}

    def test_log_probabilities_in_several_templates_are_averaged_when_each_is_balanced(self):
        both = Opinions.of({"vectors": 0.5}, balance=[{"a": 0.5, "b": -0.5}, {"a": -1.0, "b": 1.0}])
        found = both.together([{"a": -1.0, "b": -1.5}, {"a": -3.0, "b": -4.0}])
        first, second = log_softmax([-0.5, -2.0]), log_softmax([-4.0, -3.0])
        expected = 0.5 * (first + second) / 2
        assert [found["a"], found["b"]] == pytest.approx(expected.tolist())

    def test_a_task_with_fewer_templates_than_ask_is_refused(self):
        several = Opinions.of({"vectors": 1.0}, balance=[{"a": 0.0}, {"a": 0.0}])
        assert [*several.asking(3)] == [0, 1] and [*Opinions().asking(3)] == [0]
        with pytest.raises(InputError, match="Expected a task with the 2 templates that opinions ask in, found 1"):
            several.asking(1)

    def test_no_more_templates_ask_than_training_would_let(self):
        """An uploaded adapter could make a row cost as many questions as its task has templates."""
        with pytest.raises(ValueError, match="at most 3"):
            Opinions.of({"vectors": 1.0}, balance=[{"a": 0.0}] * 4)

    def test_where_vectors_do_not_count_one_template_asks(self):
        head = Opinions.of({"head": 1.0}, {"head": HEAD}, [{"a": 0.0}, {"a": 0.0}])
        assert [*head.asking(2)] == [0]
        found = head.together([{"a": 0.0, "b": 9.0}], {"head": {"a": -0.1, "b": -2.3}})
        assert found == pytest.approx({"a": -0.1, "b": -2.3})

    def test_a_label_that_the_head_does_not_know_is_the_least_probable(self):
        alone = Opinions.of({"head": 1.0}, {"head": HEAD})
        found = alone.together([{"a": 0.0, "b": 0.0, "c": 9.0}], {"head": {"a": -0.1, "b": -2.3}})
        assert found["c"] < found["b"] < found["a"]

    def test_such_a_label_has_the_vectors_probability_and_the_others_share_what_it_leaves(self):
        both = Opinions.of({"vectors": 0.5, "head": 2.0}, {"head": HEAD}, [{"a": 0.5, "b": -0.5, "c": -1.0}])
        vectors, said = {"a": -3.0, "b": -2.0, "c": -0.5}, {"a": math.log(0.9), "b": math.log(0.1)}
        p = np.exp(log_softmax([-2.5, -2.5, -1.5]))
        among = log_softmax([0.5 * math.log(p[0]) + 2 * said["a"], 0.5 * math.log(p[1]) + 2 * said["b"]])
        found = both.together([vectors], {"head": said})
        expected = {"a": math.log(1 - p[2]) + among[0], "b": math.log(1 - p[2]) + among[1], "c": math.log(p[2])}
        assert found == pytest.approx(expected)
        # However sure the head is of a label, it knows nothing of the other one.
        surer = both.together([vectors], {"head": {"a": 0.0, "b": -90.0}})
        assert surer["c"] == pytest.approx(expected["c"])
        prior, seen = {"a": 0.2, "b": 0.2, "c": 0.6}, {"a": 0.45, "b": 0.45, "c": 0.1}
        moved = both.toward(prior, seen).together([vectors], {"head": said}, temperature=2.0)
        assert moved == pytest.approx({name: expected[name] + 2 * math.log(prior[name] / seen[name]) for name in "abc"})

    def test_vectors_that_are_sure_of_it_leave_the_others_something(self):
        both = Opinions.of({"vectors": 1.0, "head": 1.0}, {"head": HEAD})
        found = both.together([{"a": -999.0, "b": -998.0, "c": 0.0}], {"head": {"a": -0.1, "b": -2.3}})
        assert all(map(math.isfinite, found.values())) and max(found, key=found.__getitem__) == "c"

    def test_the_order_of_labels_does_not_matter(self):
        both = Opinions.of({"vectors": 0.7, "head": 0.9}, {"head": HEAD})
        said = {"a": -0.3, "b": -1.35}
        found = both.together([{"a": -3.1, "b": -2.2, "c": -0.7}], {"head": said})
        other = both.together([{"c": -0.7, "b": -2.2, "a": -3.1}], {"head": dict(reversed(said.items()))})
        assert found == other


class TestWeigh:
    def test_the_better_opinion_counts_more(self):
        found = weigh({"vectors": opinion(Y, 0.6), "head": opinion(Y, 0.85, seed=1)}, Y)
        assert found["head"] > found["vectors"] > 0

    def test_an_opinion_that_adds_nothing_is_not_asked(self):
        wrong = log_softmax(np.random.default_rng(2).normal(size=(90, 3)) * 4, axis=1)
        assert set(weigh({"vectors": wrong, "head": opinion(Y, 0.95)}, Y)) == {"head"}

    def test_the_sum_is_no_worse_than_each(self):
        parts = {"vectors": opinion(Y, 0.75), "head": opinion(Y, 0.75, seed=3)}
        found = weigh(parts, Y)
        assert set(found) == set(parts)

        def loss(log_probs):
            return -log_softmax(log_probs, axis=1)[np.arange(90), Y].mean()

        together = loss(sum(found[name] * part for name, part in parts.items()))
        assert together < min(map(loss, parts.values()))

    def test_a_label_that_weighs_twice_is_as_if_its_rows_were_there_twice(self):
        parts = {"vectors": opinion(Y, 0.75), "head": opinion(Y, 0.75, seed=3)}
        twice = [*range(90), *np.flatnonzero(np.array(Y) == 1)]
        expected = weigh({name: part[twice] for name, part in parts.items()}, [Y[row] for row in twice])
        found = weigh(parts, Y, np.array([1.0, 2.0, 1.0]))
        assert found == pytest.approx(expected, rel=1e-2) and found != pytest.approx(weigh(parts, Y), rel=1e-2)

    def test_with_few_rows_weights_stay_near_the_usual(self):
        sure = np.log(np.array([[0.999, 0.001], [0.001, 0.999]]))
        found = weigh({"vectors": sure, "head": sure}, [0, 1])
        assert all(0.5 < weight < 1.3 for weight in found.values())


class TestFiles:
    def test_they_come_back(self):
        both = Opinions.of(
            {"vectors": 0.5, "head": 2.0, "sentences": 0.3}, {"head": HEAD, "sentences": SMALL}, encoder="minilm"
        )
        files = both.files()
        heads = {"head": Head.from_bytes(files[HEAD_NAME], HEAD_NAME)}
        heads["sentences"] = Head.from_bytes(files[SENTENCES_NAME], SENTENCES_NAME)
        again = Opinions.from_json(files[OPINIONS_NAME], OPINIONS_NAME, heads.get)
        assert again.model_dump() == both.model_dump() and again.heads["head"].labels == HEAD.labels
        assert again.heads["sentences"].weight.shape == (2, 1, 5) and again.encoder == "minilm"
        assert set(Opinions().files()) == {OPINIONS_NAME}

    def test_an_encoder_that_does_not_count_is_not_kept(self):
        found = Opinions.of({"head": 1.0}, {"head": HEAD, "sentences": SMALL}, encoder="minilm")
        assert found.encoder is None and set(found.heads) == {"head"} and found.weights == {"head": 1.0}

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"{", "Expected JSON in opinions.json"),
            (b'{"vectors": -1}', "vectors"),
            (b'{"vectors": 1, "heads": 2}', "heads"),
            (b'{"vectors": 0, "head": 0}', "Expected an opinion that counts in opinions.json, found none"),
            (b'{"vectors": 1, "head": 1}', "Expected a head"),
            (b'{"vectors": 1, "sentences": 1, "encoder": "minilm"}', r"Expected a head \(sentences.safetensors\)"),
            (b'{"vectors": 1, "sentences": 1}', "expected an encoder where sentences count"),
            (b'{"vectors": 1, "encoder": "minilm"}', "expected an encoder where sentences count"),
            (b'{"vectors": NaN}', "opinions.json"),
        ],
    )
    def test_damaged_ones_are_refused(self, data, message):
        with pytest.raises(InputError, match=message):
            Opinions.from_json(data, OPINIONS_NAME, lambda name: None)
