"""Label texts with the ONNX model in this folder: python answer.py "some text" "another one"

It needs onnxruntime, tokenizers and NumPy. A row of several columns is JSON: python answer.py '{"title": "…", "body": "…"}'
In Python: `Model(folder).answer(texts)`. `ia3 export` has put this file here.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

_AT_ONCE = 16


class Model:
    """The model of a folder, and its task.

    >>> Model("tickets-onnx").answer(["I was charged twice"])
    [{'label': 'billing', 'probabilities': {'billing': 0.9, 'technical': 0.1}}]
    """

    def __init__(self, folder: str | Path) -> None:
        self.task: dict[str, Any] = json.loads(Path(folder, "answer.json").read_text(encoding="utf-8"))
        self.session: Any = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")))
        self.tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.columns = list(dict.fromkeys(piece["column"] for piece in self.task["prompt"] if isinstance(piece, dict)))

    def answer(self, rows: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The label of each text or row, and the probability of each label."""
        found = []
        for start in range(0, len(rows), _AT_ONCE):
            asked = [self._inputs(row) for row in rows[start : start + _AT_ONCE]]
            [probabilities] = self.session.run(["probabilities"], self._batch(asked))
            found += [self._answered(row) for row in probabilities.tolist()]
        return found

    def _prompt(self, row: str | Mapping[str, Any]) -> str:
        if isinstance(row, str):
            if len(self.columns) != 1:
                raise ValueError(f"Expected a row with the columns {self.columns}, found a text alone.")
            row = {self.columns[0]: row}
        missing = [name for name in self.columns if name not in row]
        if missing:
            raise ValueError(f"Expected a row with the columns {self.columns}, found none of {missing}.")
        cells = {name: row[name] for name in self.columns}
        for name, cell in cells.items():
            if not isinstance(cell, (str, int, float, type(None))):
                raise ValueError(f"Expected a text or a number as {name!r}, found a {type(cell).__name__}.")
        texts = {name: "" if cell is None else str(cell) for name, cell in cells.items()}
        if not any(text.strip() for text in texts.values()):
            raise ValueError(f"Expected some text in {self.columns}, found it empty.")
        pieces = (piece if isinstance(piece, str) else texts[piece["column"]] for piece in self.task["prompt"])
        return "".join(pieces).rstrip()

    def _inputs(self, row: str | Mapping[str, Any]) -> tuple[list[int], int]:
        """The tokens that are read of a row, and how many of the last ones are the question."""
        prompt, question = self._prompt(row), self.task["question"]
        text = prompt[: -len(question)] if question and prompt.endswith(question) else ""
        if not self.task["reads_question"]:
            prompt, text = text.rstrip() or prompt, ""
        tokens = self._tokens(prompt)
        most = self.task["max_tokens"]
        if most is not None and len(tokens) > most:
            raise ValueError(f"Expected at most {most} tokens, found {len(tokens)}; shorten the row.")
        if not text:
            return tokens, len(tokens)
        # A token of the text's end and the question's beginning is the question's.
        pairs = list(zip(self._tokens(text), tokens, strict=False))
        common = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
        return tokens, max(len(tokens) - common, 1)

    def _tokens(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text).ids
        closing = self.task["closing"]  # the token behind a text, and how it is written
        if closing and len(tokens) > 1 and tokens[-1] == closing["token"] and not text.endswith(closing["text"]):
            return tokens[:-1]  # here the text goes on
        return tokens

    def _batch(self, asked: Sequence[tuple[list[int], int]]) -> dict[str, np.ndarray]:
        longest = max(len(tokens) for tokens, _ in asked)
        ids = np.full((len(asked), longest), self.task["pad"], dtype=np.int64)
        mask = np.zeros((len(asked), longest), dtype=np.int64)
        for row, (tokens, _) in enumerate(asked):
            places = slice(longest - len(tokens), None) if self.task["pads_left"] else slice(len(tokens))
            ids[row, places], mask[row, places] = tokens, 1
        lengths = np.array([length for _, length in asked], dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "question_tokens": lengths}
        return {one.name: inputs[one.name] for one in self.session.get_inputs()}

    def _answered(self, probabilities: Sequence[float]) -> dict[str, Any]:
        found = dict(zip(self.task["labels"], probabilities, strict=True))
        costs = self.task["costs"]  # truth → given → what it costs; other mistakes cost 1

        def cost(given: str) -> float:
            return sum(p * costs.get(truth, {}).get(given, float(truth != given)) for truth, p in found.items())

        return {"label": min(found, key=lambda label: (cost(label), -found[label], label)), "probabilities": found}


def _row(text: str) -> str | dict[str, Any]:
    """A row of several columns, which is JSON, or a text."""
    if text.startswith("{"):
        with suppress(json.JSONDecodeError):
            return json.loads(text)
    return text


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(
            'Expected texts, for example: python answer.py "some text". Rows of a file: Model(folder).answer(rows)'
        )
    try:
        given = [_row(text) for text in sys.argv[1:]]
        answers = Model(Path(__file__).parent).answer(given)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(answers, indent=2, ensure_ascii=False))
