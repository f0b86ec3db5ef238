"""Write an adapter, its base model and its task as an ONNX file: `export`."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ia3.answering import load_adapted
from ia3.errors import InputError, needs, reason, shown
from ia3.evaluation.prediction import predict
from ia3.files import new_folder, write_json
from ia3.folder import AdapterFolder
from ia3.onnx.graph import Graph
from ia3.opinions.opinions import VECTORS, Opinions
from ia3.scoring import trials
from ia3.scoring.decoder import Decoder
from ia3.scoring.encoder_decoder import EncoderDecoder
from ia3.scoring.scorer import Scorer
from ia3.task.task import Task
from ia3.task.template import columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

TOLERANCE = 1e-4
"""How far a probability of the exported model may be from the adapter's."""

# A file of the format has no more than 2 GiB; larger weights stand beside it.
_MOST_INSIDE = 1_900_000_000

_Pieces = list[str | dict[str, str]]


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        bytes: of all files.
        rows: how many rows it was tried on.
        difference: the largest one between probabilities of the folder and of the adapter, on these rows.
    """

    bytes: int
    rows: int
    difference: float


def require_packages() -> None:
    """Raise `InputError` unless the packages of the extra are installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise needs("Exporting", name, "onnx")


def export(folder: AdapterFolder, output: Path, model: str | None = None) -> Exported:
    """Write a folder with `model.onnx`, whose probabilities are those of `ia3 predict`, the tokenizer, the task in JSON, and
    `answer.py`, which answers with them without this package.

    It is tried on some rows before it gets its name.

    Args:
        folder: the adapter's.
        output: a new folder.
        model: the base model; None: the one that the adapter names.

    Raises:
        InputError: an adapter that cannot be exported exactly; the message says what to train instead.
    """
    require_packages()
    task, opinions = folder.required_task(), folder.opinions
    answers, pieces = _fixed(task, opinions)
    adapted, tokenizer = load_adapted(folder, model, "float32")
    kind = type(adapted.get_base_model()).__name__
    scorer = Scorer(adapted.eval(), tokenizer)
    if isinstance(scorer.family, EncoderDecoder):
        raise InputError(
            f"Expected a decoder or an encoder, found the encoder-decoder {kind}, which is not exported",
            "train with another --model, or serve this one: ia3 serve",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"Expected a tokenizer with a tokenizer.json, found a {type(tokenizer).__name__}.")
    rows = _rows(task, answers, scorer)
    questions = scorer.questions([task.wording(row) for row in rows], labelled=False)
    if not trials.packs(scorer.family, questions):
        raise InputError(
            f"Expected a model that reads a prompt's answers in one row, found a {kind}, which does not",
            "train with another --model, or serve this one: ia3 serve",
        )
    graph = Graph(
        scorer, questions[0], [*answers], folder.recipe.length_normalization, opinions, folder.temperature
    ).eval()
    described = _described(scorer, tokenizer, task, answers, pieces, max(map(len, questions[0].choices)))
    with new_folder(output) as temporary:
        _save(graph, temporary / "model.onnx", kind)
        tokenizer.backend_tokenizer.save(str(temporary / "tokenizer.json"))  # type: ignore[attr-defined]
        write_json(temporary / "answer.json", described)
        shutil.copyfile(Path(__file__).with_name("answer.py"), temporary / "answer.py")
        from ia3.onnx.answer import Model

        found = Model(temporary).answer(rows)
        expected = predict(
            adapted,
            tokenizer,
            task,
            rows,
            temperature=folder.temperature,
            recipe=folder.recipe,
            opinions=opinions,
        )
        pairs = zip(found, expected, strict=True)
        difference = max(
            abs(one["probabilities"][label] - p) for one, other in pairs for label, p in other.probabilities.items()
        )
        if not difference <= TOLERANCE:
            raise InputError(
                f"The exported {kind} gives probabilities that differ by {difference:.2g} from the adapter's, so nothing is written; "
                f"serve the adapter instead: ia3 serve."
            )
    return Exported(sum(file.stat().st_size for file in output.iterdir()), len(rows), difference)


def _fixed(task: Task, opinions: Opinions) -> tuple[dict[str, str], _Pieces]:
    """Label → answer text, the same for all rows, and the prompt without Jinja. Raises `InputError` for anything else."""
    if task.multi_label:
        raise InputError(f"Expected a task with one label a row, found the multi-label task {task.name!r}.")
    if [*opinions.weights] != [VECTORS]:
        raise InputError(
            f"Expected an adapter whose vectors answer alone, found the opinions {shown(opinions.weights)}; train it with "
            f"--opinions vectors."
        )
    if len(opinions.balance) > 1:
        raise InputError(
            f"Expected an adapter that is asked in one template, found {len(opinions.balance)}; train it with --opinions vectors."
        )
    choices = task.choices_of(0)
    if isinstance(choices, str) or columns_of(choices):
        raise InputError(
            f"Expected the same answers for all rows, found answers that {task.name!r} takes from columns."
        )
    answers = task.answers({})
    pieces = task.templates[0].pieces(answers.values())
    if pieces is None:
        raise InputError(
            "Expected a template of text and columns alone, such as '{{ text }} Sentiment:', found one with other parts of "
            "Jinja; train with a simpler --template, and change the columns beforehand."
        )
    return answers, pieces


def _described(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    answers: dict[str, str],
    pieces: _Pieces,
    longest: int,
) -> dict[str, Any]:
    """What `answer.py` has to know of task, tokenizer and model."""
    family = scorer.family
    is_decoder = isinstance(family, Decoder)
    closing = {"token": tokenizer.eos_token_id, "text": tokenizer.eos_token}
    limit = family.max_length
    template = task.templates[0]
    return {
        "task": task.name,
        "labels": [*answers],
        "prompt": pieces,
        "question": template.question(answers.values() if template.sees_answers else ()),
        "reads_question": family.reads_questions,
        "max_tokens": None if limit is None else limit - (longest if is_decoder else 0),
        "closing": closing if is_decoder and tokenizer.eos_token_id is not None else None,
        "pad": _pad(scorer),
        "pads_left": is_decoder,
        "costs": task.costs,
    }


def _pad(scorer: Scorer) -> int:
    own = None if isinstance(scorer.family, Decoder) else getattr(scorer.family.base.config, "pad_token_id", None)
    return scorer.family.pad_token_id if own is None else own


def _rows(task: Task, answers: dict[str, str], scorer: Scorer) -> list[dict[str, str]]:
    """Rows of different lengths that the model has room for, to try it on, made of the task's own words."""
    words = " ".join([task.name, *answers.values()]).split()
    found = []
    for count in (1, 3, 12, 60):
        text = " ".join(itertools.islice(itertools.cycle(words), count))
        row = dict.fromkeys(task.columns, text)
        if count == 1 or scorer.question(task.wording(row), labelled=False).cut is None:
            found.append(row)
    return found


def _save(graph: Graph, path: Path, kind: str) -> None:
    """Write a graph as an ONNX file, for batches of any size."""
    ids = torch.ones((2, 5), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids.clone()}
    if graph.waits:
        inputs["question_tokens"] = torch.tensor([3, 2])
    shapes = {name: {0: "rows", 1: "tokens"} if value.dim() == 2 else {0: "rows"} for name, value in inputs.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says which operators of torchvision it does not know
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about itself
            program = torch.onnx.export(
                graph,
                (),
                kwargs=inputs,
                input_names=[*inputs],
                output_names=["probabilities"],
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,  # onnxruntime does so when it loads the file, in less time
                verbose=False,
            )
            assert program is not None
            size = sum(one.nbytes for one in graph.parameters())
            program.save(str(path), external_data=size > _MOST_INSIDE)
    except Exception as error:  # of torch, onnxscript or a model's own code, whatever it may be
        raise InputError(
            f"torch cannot export a {kind}: {reason(error)}", "serve the adapter instead: ia3 serve"
        ) from error
