"""The model type `ia3` against the harness's own `hf`, in its commands and in Python."""

import functools
import json
import re
import shlex
import sys

import pytest
import torch

from ia3 import InputError
from support import words
from support.paths import ROOT

lm_eval = pytest.importorskip(
    "lm_eval", reason="the lm-evaluation-harness is not installed: pip install 'ia3[lm-eval]'"
)
pytest.importorskip("peft", reason="PEFT is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ia3.harness import __main__ as command  # noqa: E402
from ia3.harness.model import IA3LM, sharing_panels  # noqa: E402
from ia3.harness.running import evaluate_each, own  # noqa: E402

PAGE = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- example: ([\w.-]+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
QUESTION = "question :"

ROWS = words.rows(6)
CONTEXTS = [f"{row['text']} question : good or bad ? answer :" for row in ROWS]
# White space at a context's end goes to the continuation; an empty context becomes the end-of-text token.
PAIRS = [(context, answer) for context in CONTEXTS for answer in (" good", " not good", " bad tea soup")]
PAIRS += [("", " good tea"), ("the tea question : ", " is good"), ("the tea question :\n", "is good")]


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=index) for index, each in enumerate(arguments)]


@pytest.fixture
def both(place):
    """Makes the same model as our type and as theirs."""

    def make(name, **options):
        folder = None if name is None else str(place / "adapters" / name)
        theirs = {} if folder is None else {"peft": folder}
        hf = HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", **theirs, **options)
        return IA3LM(str(place / "model"), adapter=folder, device="cpu"), hf

    return make


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_everything_equals_the_type_hf(name, both):
    ours, hf = both(name)
    asked = instances("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(asked), hf.loglikelihood(asked)
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    asked = instances("loglikelihood_rolling", [(" ".join(CONTEXTS),), ("tea",)])
    torch.testing.assert_close(ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked), atol=1e-4, rtol=0)
    options = {"until": ["bad", "soup"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    asked = instances("generate_until", [(context, options) for context in CONTEXTS])
    said = ours.generate_until(asked)
    assert said == hf.generate_until(asked) and any(said)


def test_long_requests_lose_their_beginning_as_in_hf(place, both, monkeypatch):
    monkeypatch.setattr(HFLM, "max_length", 12)
    ours, hf = both("one")
    asked = instances("loglikelihood", [(" ".join(CONTEXTS[:2]), " good"), (CONTEXTS[0], " bad tea soup"), *PAIRS])
    found, expected = ours.loglikelihood(asked), hf.loglikelihood(asked)
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], atol=1e-4, rtol=0)
    asked = instances("loglikelihood_rolling", [(" ".join(CONTEXTS),)])
    torch.testing.assert_close(ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked), atol=1e-4, rtol=0)
    asked = instances("generate_until", [(CONTEXTS[0], {"until": [], "max_gen_toks": 4})])
    assert ours.generate_until(asked) == hf.generate_until(asked)
    with pytest.raises(InputError, match="at most 12 tokens, found 13"):
        ours.loglikelihood(instances("loglikelihood", [("tea", " good" * 13)]))
    with pytest.raises(InputError, match="fewer than 12 new tokens"):
        ours.generate_until(instances("generate_until", [("tea", {"until": [], "max_gen_toks": 12})]))


def test_adapters_act_from_the_question_on(place, monkeypatch):
    """Against passes of the model with all tokens of one context and one answer, and the place of its question."""
    from ia3 import IA3Model, load_base

    base, tokenizer = load_base(str(place / "model"))
    model = IA3Model.from_pretrained(base, place / "adapters" / "asks")
    options = {"adapter": str(place / "adapters" / "asks"), "device": "cpu"}
    ours = IA3LM(str(place / "model"), question=QUESTION, **options)
    everywhere = IA3LM(str(place / "model"), question="", **options)
    # One prompt with a shot before it, whose question does not count; and white space that is the continuation's.
    pairs = [*PAIRS[:15], (f"{CONTEXTS[1]} good {CONTEXTS[0]}", " good"), (f"{CONTEXTS[0]} ", "good")]
    scores = []
    for lm, limit in ((ours, 64), (everywhere, 64), (ours, 10)):  # the last one cuts texts and keeps questions
        monkeypatch.setattr(HFLM, "max_length", limit)
        found = lm.loglikelihood(instances("loglikelihood", pairs))
        for (context, answer), (score, _) in zip(pairs, found, strict=True):
            before = tokenizer(context)["input_ids"]
            chosen = torch.tensor(tokenizer(answer)["input_ids"])
            start = len(tokenizer(context.rpartition(QUESTION)[0])["input_ids"]) if lm is ours else 0
            cut = max(len(before) + len(chosen) - limit - 1, 0)
            ids = torch.tensor([[*before, *chosen]])[:, cut:-1]
            with torch.no_grad():
                logits = model(input_ids=ids, acts_from=[max(start - cut, 0)]).logits[0, -len(chosen) :].log_softmax(-1)
            assert score == pytest.approx(float(logits.gather(1, chosen[:, None]).sum()), abs=1e-4)
            scores.append(score)
    assert scores[:17] != pytest.approx(scores[17:34], abs=1e-2) != scores[34:]
    with pytest.raises(InputError, match="Expected a prompt with 'question :', found 'the tea'"):
        ours.loglikelihood(instances("loglikelihood", [("the tea", " good")]))
    with pytest.raises(InputError, match="Expected the words with which the question begins"):
        IA3LM(str(place / "model"), **options)


def test_what_we_do_not_do_is_refused(place, both):
    ours, _ = both("one")
    for wrong in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 2}):
        with pytest.raises(InputError, match="Expected greedy decoding"):
            ours.generate_until(instances("generate_until", [("tea", {"until": [], **wrong})]))
    with pytest.raises(InputError, match=r"python -m ia3\.harness"):
        IA3LM(str(place / "model"), adapters=str(place / "adapters"))
    with pytest.raises(InputError, match="Expected one of '__base__', found 'other'"):
        IA3LM(str(place / "model"), adapter="other", adapters="__base__", device="cpu")


@pytest.fixture
def tickets(place, tmp_path, monkeypatch):
    """The files that docs/lm-eval.md names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    # It takes seconds to find the tasks that come with the harness.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # so does asking pip and compilers
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tickets-base").symlink_to(place / "model")
    (tmp_path / "adapters").symlink_to(place / "adapters")
    lines = [json.dumps({"message": row["text"], "label": index % 2}) for index, row in enumerate(words.rows(16))]
    (tmp_path / "tickets.jsonl").write_text("\n".join(lines))
    (tmp_path / "lm-eval-task.yaml").write_text(BLOCKS["lm-eval-task.yaml"])
    return tmp_path


def test_many_adapters_have_the_results_of_runs_of_hf(tickets):
    tasks = ["lm-eval-task.yaml"]
    found = evaluate_each("tickets-base", "__base__|adapters/one|adapters/two", tasks, device="cpu")
    assert [*found] == ["__base__", "adapters/one", "adapters/two"]
    scores = []
    for name, its in found.items():
        arguments = {"pretrained": "tickets-base", "dtype": "float32"} | ({} if "base" in name else {"peft": name})
        expected = lm_eval.simple_evaluate("hf", arguments, tasks=tasks, device="cpu", bootstrap_iters=0)
        assert its["results"]["tickets"]["acc,none"] == expected["results"]["tickets"]["acc,none"]
        for one, other in zip(its["samples"]["tickets"], expected["samples"]["tickets"], strict=True):
            mine, theirs = ([float(answer[0][0]) for answer in each["resps"]] for each in (one, other))
            assert mine == pytest.approx(theirs, abs=1e-4)
            scores.append(mine[0])
        assert its["config"]["adapter"] == name and its["config"]["model_args"]["adapter"] == name
    assert len(set(scores)) > 16


def test_adapters_keep_caches_of_their_own(tickets):
    options = {"device": "cpu", "use_cache": str(tickets / "kept")}
    first, again = (
        evaluate_each("tickets-base", "adapters/one|adapters/two", ["lm-eval-task.yaml"], **options) for _ in range(2)
    )
    assert first["adapters/one"]["samples"] != first["adapters/two"]["samples"]
    assert len([*tickets.glob("kept_adapters_*")]) == 2
    for name, its in first.items():
        resps, kept = ([one["resps"] for one in each["samples"]["tickets"]] for each in (its, again[name]))
        assert resps == kept


def test_the_base_model_is_loaded_once(tickets, monkeypatch):
    from ia3.harness import panel

    loaded = []
    load = panel.load_base
    monkeypatch.setattr(panel, "load_base", lambda *args, **options: loaded.append(args) or load(*args, **options))
    evaluate_each("tickets-base", "adapters", ["lm-eval-task.yaml"], QUESTION, device="cpu", limit=2)
    assert len(loaded) == 1
    IA3LM("tickets-base", device="cpu")
    with sharing_panels():
        one, other = (IA3LM("tickets-base", device="cpu") for _ in range(2))
    assert one._panel is other._panel and len(loaded) == 3


def test_the_commands_of_the_page(tickets, monkeypatch, capsys):
    for number, line in enumerate(BLOCKS["lm-eval"].strip().splitlines()):
        program, *arguments = shlex.split(line)
        assert (program, *arguments[:2]) == ("python", "-m", "ia3.harness")
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments[2:]])
        command.main()
        said = capsys.readouterr().out
        tables = re.findall(r"^ia3 \((.*)\), gen_kwargs", said, re.MULTILINE)
        assert len(tables) == (1, 3, 3)[number] and said.count("|tickets|") == len(tables)
    folders = sorted(path.name for path in tickets.glob("results_*"))
    assert folders == sorted(own("results", name) for name in ("__base__", "adapters/one", "adapters/two"))
    for folder in folders:
        [file] = (tickets / folder).rglob("results_*.json")
        assert own("results", json.loads(file.read_text())["config"]["adapter"]) == folder


def test_python_of_the_page(tickets, monkeypatch, capsys):
    exec(compile(BLOCKS["lm-eval-python"], "lm-eval-python", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if len(line) == 2] == ["__base__", "adapters/one", "adapters/two"]


def test_an_error_is_one_line(tickets, monkeypatch, capsys):
    arguments = "--model ia3 --model_args pretrained=tickets-base,adapters=adapters/one|adapters/one --tasks tickets"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == "Expected different adapters, found 'adapters/one'; see adapters."
