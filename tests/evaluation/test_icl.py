"""Which shots there are, how they look, and that predictions are those of prompts behind them."""

import pytest

from ia3 import InputError, Task, predict, score_choices
from ia3.evaluation.icl import draw_shots, fitting, predict_in_context, shots_text
from support import words

TASK = Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})


class TestShots:
    def test_text(self):
        shots = [{"text": "tea is lovely", "label": "pos"}, {"text": "soup is stale", "label": "neg"}]
        assert shots_text(TASK, shots) == (
            "review : tea is lovely answer : good\n\nreview : soup is stale answer : not good"
        )

    @pytest.mark.parametrize("count", [1, 4, 7, 12])
    def test_draws_are_balanced_random_and_nested(self, count):
        rows = [{"text": str(i), "label": "pos" if i % 4 else "neg"} for i in range(16)]
        drawn = draw_shots(rows, TASK, count, seed=3)
        assert drawn == draw_shots(rows, TASK, count, seed=3) and len({row["text"] for row in drawn}) == count
        negative = sum(row["label"] == "neg" for row in drawn)
        assert abs(negative - count / 2) <= 0.5 or negative == 4
        larger = draw_shots(rows, TASK, count + 2, seed=3)
        assert {row["text"] for row in drawn} < {row["text"] for row in larger}
        assert {row["text"] for row in drawn} <= {row["text"] for row in rows}
        assert any(draw_shots(rows, TASK, count, seed) != drawn for seed in range(4, 8))

    def test_as_drawn(self):
        rows = [{"text": str(i), "label": "pos" if i % 8 else "neg"} for i in range(32)]
        shares = [sum(r["label"] == "neg" for r in draw_shots(rows, TASK, 16, s, balanced=False)) for s in range(20)]
        assert len(set(shares)) > 1 and 1 < sum(shares) / 20 < 3

    @pytest.mark.parametrize("count", [0, 5])
    def test_more_than_there_are(self, count):
        with pytest.raises(InputError, match=f"between 1 and 4 shots, as many as there are rows, found {count}"):
            draw_shots(words.rows(4), TASK, count)

    def test_predictions_are_those_of_prompts_with_shots(self, llama):
        tokenizer, rows = words.tokenizer(), words.rows(10, seed=1)
        shots = draw_shots(words.rows(20), TASK, 4)
        done = []
        found = predict_in_context(llama, tokenizer, TASK, rows, shots, done.extend)
        assert sorted(done) == list(range(10))
        text = shots_text(TASK, shots)
        scores = score_choices(
            llama, tokenizer, [f"{text}\n\n{TASK.prompt(row)}" for row in rows], [[" good", " not good"]] * 10
        )
        for prediction, expected in zip(found, scores, strict=True):
            assert list(prediction.probabilities.values()) == pytest.approx(expected.softmax(-1).tolist(), abs=1e-4)
        assert found != predict(llama, tokenizer, TASK, rows)

    def test_shots_that_do_not_fit(self, gpt2):
        tokenizer, rows = words.tokenizer(), words.rows(2)  # 9 tokens and an answer of at most two: 64 // 11 rows
        shots = draw_shots(words.rows(20), TASK, 8)
        fit = fitting(gpt2, tokenizer, TASK, shots, rows)
        assert len(tokenizer(shots_text(TASK, shots[:fit]))["input_ids"]) + 10 <= 64
        assert len(tokenizer(shots_text(TASK, shots[: fit + 1]))["input_ids"]) + 10 > 64
        with pytest.raises(InputError, match=f"64 tokens with the longest prompt, found 8, of which {fit} fit"):
            predict_in_context(gpt2, tokenizer, TASK, rows, shots)
        predict_in_context(gpt2, tokenizer, TASK, rows, shots[:fit])
        with pytest.raises(InputError, match="at least one token"):
            predict_in_context(gpt2, tokenizer, TASK, rows, [])
