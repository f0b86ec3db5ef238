"""`python -m benchmarks`: all columns do the same job, and the command writes, goes on, and says what is missing."""

import contextlib
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.__main__ import main
from benchmarks.jobs import report
from benchmarks.jobs import run as running
from benchmarks.jobs.floor import Floor, needed, shared_beginning
from benchmarks.jobs.ours import InBfloat16, Ours
from benchmarks.jobs.peers import Authors, Column, Peft, mean_scores, padded_log_probs, repeated_log_probs, three_losses
from benchmarks.jobs.rows import Phase, Row, suite, task_of
from benchmarks.jobs.worker import Memory
from ia3 import tfew_loss
from support import tiny
from support.screen import require_whole

REVIEWS = [
    "This tea is lovely and fresh; I will buy it again.",
    "Stale! Half of the cans were dented.",
    "Not bad at all",
]
COLUMNS = {"ours": Ours, "bfloat16": InBfloat16, "peft": Peft, "authors": Authors, "floor": Floor}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokens are parts of words."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*REVIEWS, *(f" {text}" for text in task_of(77)["choices"])] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    tiny.build("llama", vocab_size=600, max_position_embeddings=512).save_pretrained(folder)
    return str(folder)


def smaller(row: Row) -> Row:
    """A row with few units, so that it takes no time."""
    points = row.settings.get("points", {})
    if row.kind == "score":
        points = {name: (min(rows, 2), count) for name, (rows, count) in points.items()}
    if row.kind == "mixed":
        points = {name: min(count, 9) for name, count in points.items()}
    less = {"points": points, "rows": 6, "length": 8, "new": 5, "adapters": 3, "batch_size": 2}
    return replace(row, settings={**row.settings, **{key: less[key] for key in less if key in row.settings}})


def done(folder: str, row: Row, columns=("ours", "peft", "authors")) -> dict[str, tuple[dict, list[float]]]:
    """What columns give for a row, each on a model of its own."""
    job = row.job(REVIEWS)
    return {name: COLUMNS[name](folder).prepare(job)() for name in columns}


@pytest.mark.parametrize("name", ["score-2", "score-6", "score-77"])
def test_all_columns_give_the_same_scores(folder, name):
    row = smaller(suite()[name])
    found = done(folder, row)
    count = row.settings["points"]["score"]
    assert len(found["ours"][1]) == math.prod(count)
    for peer in ("peft", "authors"):
        torch.testing.assert_close(torch.tensor(found[peer][1]), torch.tensor(found["ours"][1]), atol=1e-4, rtol=0)
    plain = Column.scores(
        Floor(folder),
        Floor(folder).model,
        tuple(row.job(REVIEWS)["points"][0][key] for key in ("prompts", "choices", "labels")),
    )
    assert max(abs(a - b) for a, b in zip(plain, found["ours"][1], strict=True)) > 1e-3  # the adapter is in use


@pytest.mark.parametrize("name", ["train-2", "train-77"])
def test_all_columns_train_the_same(folder, name):
    row = suite()[name]
    size = 4 if name == "train-2" else 1
    row = replace(
        row,
        phases={"setup": Phase(), "train": Phase(3 * size, 320, "examples"), "evaluate": Phase(2, 200, "rows")},
        settings={**row.settings, "batch_size": size},
    )
    found = done(folder, row)
    seconds, mine = found["ours"]
    assert set(seconds) == {"setup", "train", "evaluate"} and len(mine) == 3 + 2 * row.settings["choices"]
    assert len(set(mine[:3])) == 3  # losses of three steps
    for peer in ("peft", "authors"):
        torch.testing.assert_close(torch.tensor(found[peer][1]), torch.tensor(mine), atol=1e-4, rtol=0)


def test_a_job_can_be_done_again(folder):
    row = smaller(suite()["train-2"])
    row = replace(row, phases={"setup": Phase(), "train": Phase(2, 320), "evaluate": Phase(1, 200)})
    for name in ("ours", "peft", "authors", "floor"):
        run = COLUMNS[name](folder).prepare(row.job(REVIEWS))
        assert run()[1] == run()[1], name


@pytest.mark.parametrize("name", ["mixed", "curve-adapters"])
def test_rows_with_adapters_of_their_own(folder, name):
    row = smaller(suite()[name])
    found = done(folder, row, ("ours", "peft"))
    torch.testing.assert_close(torch.tensor(found["peft"][1]), torch.tensor(found["ours"][1]), atol=1e-4, rtol=0)
    floor = Floor(folder)
    job = row.job(REVIEWS)
    plain = floor.last_logits(floor.model, floor.ids_of(job["prompts"], job["length"])).log_softmax(-1)[:, :4]
    mine = torch.tensor(found["ours"][1]).view(len(job["points"]), 6, 4)
    assert ((mine[-1] - plain).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["load", "generate", "load-adapter", "switch-adapter"])
def test_the_other_jobs(folder, name):
    row = smaller(suite()[name])
    columns = [column for column in row.columns if column in COLUMNS]
    found = done(folder, row, columns)
    assert all(set(seconds) == set(row.phases) for seconds, _ in found.values())
    if name == "generate":
        assert found["ours"][1] == found["peft"][1] and len(found["ours"][1]) == 30


def test_every_row_has_a_job_and_texts_that_json_can_hold():
    for row in suite().values():
        assert json.loads(json.dumps(row.job(REVIEWS))) == row.job(REVIEWS)
        assert not row.commands or set(row.commands) == set(row.columns)
        assert "ours" in row.columns and row.phases and (row.kind is None) == bool(row.commands)
    assert all(phase.measured == phase.whole for row in suite(whole=True).values() for phase in row.phases.values())


def test_losses_and_scores_against_the_packages_own():
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand((3, 4, 5), generator=generator, dtype=torch.float64) * 3
    mask = torch.arange(5) < torch.randint(1, 6, (3, 4, 1), generator=generator)
    log_probs = log_probs * mask
    labels = torch.tensor([0, 3, 1])
    torch.testing.assert_close(three_losses(log_probs, mask, labels), tfew_loss(log_probs, mask, labels).total)


def test_repeated_and_padded_prompts_agree_with_gradients(folder):
    column = Peft(folder)
    model = column.adapt(column.model)
    examples = [([5, 6, 7, 8], [[9], [10, 11, 12]], 0), ([13, 14], [[15, 16], [17]], 1)]
    gradients = []
    for log_probs in (padded_log_probs, repeated_log_probs):
        found, mask = log_probs(model, examples)
        three_losses(found, mask, torch.tensor([0, 1])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    one, whole = (mean_scores(*padded_log_probs(model, some)) for some in (examples[:1], examples))
    torch.testing.assert_close(one, whole[:1])


def test_the_floor_reads_each_token_once():
    examples = [([1, 2, 3], [[7, 8, 9], [7, 8, 10], [11]], 0), ([1, 2, 4, 5], [[7, 8, 9], [7, 8, 10], [11]], 1)]
    assert needed(examples[:1]) == (3 + 2, 3)  # the prompt, "7" and "7 8"; one prediction behind each, and the prompt's
    assert shared_beginning(examples) == 2
    assert needed(examples, 2) == (1 + 2 + 2 + 2, 6)
    assert shared_beginning(examples[:1]) == 0
    assert shared_beginning([([1, 2], [[3]], 0)] * 2) == 1  # a prompt keeps a token


def test_samples_are_scaled_and_ratios_are_of_the_same_repeat():
    row = Row("r", "job", "train", ("ours", "peft", "floor"), {"setup": Phase(), "train": Phase(2, 20, "examples")})
    runs = {
        "ours": [{"setup": 1.0, "train": 1.0}, {"setup": 1.0, "train": 2.0}, {"setup": 1.0, "train": 3.0}],
        "peft": [{"setup": 2.0, "train": 2.0}, {"setup": 2.0, "train": 4.0}, {"setup": 3.0, "train": 9.0}],
        "floor": [{"setup": 0.0, "train": 1.0}] * 3,
    }
    made = report.summary(
        row, runs, {"ours": 10.0, "peft": 50.0, "floor": 5.0}, {"ours": [1.0, 2.0], "peft": [1.0, 2.5]}, {}
    )
    assert made["columns"]["ours"]["seconds"] == [11, 21, 31]
    assert made["columns"]["ours"]["phases"]["train"]["median"] == 20
    assert made["ratios"]["peft/ours"]["values"] == [2, 2, 3]
    assert made["ratios"]["peft/ours"]["median"] == 2 and made["ratios"]["peft/ours"]["quartiles"] == [2, 2.5]
    assert made["ratios"]["peft/ours"]["memory"] == 5 and made["ratios"]["ours/floor"]["values"] == [1.1, 2.1, 3.1]
    said = report.notes({"rows": {"r": made}, "left_out": {"adapterhub": "not there"}})
    assert said == [
        "job: all columns measured on 2 of 20 examples, and scaled linearly.",
        "job: results of PEFT + Trainer differ from ours by 0.5.",
        "Left out: AdapterHub: not there.",
    ]


@pytest.mark.parametrize("its", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_numbers_that_cannot_be_compared_are_said(its):
    row = Row("r", "job", "train", ("ours", "peft"), {"train": Phase()})
    runs = {"ours": [{"train": 1.0}], "peft": [{"train": 1.0}]}
    made = report.summary(row, runs, {"ours": 1.0, "peft": 1.0}, {"ours": [1.0, 2.0], "peft": its}, {})
    assert made["differences"] == {"peft": None} and json.loads(json.dumps(made, allow_nan=False))
    said = "job: results of PEFT + Trainer differ from ours in number or are not finite."
    assert report.notes({"rows": {"r": made}, "left_out": {}}) == [said]


class Inside:
    """A worker in this process; fails at what `broken` names."""

    broken = ()

    def __init__(self, column, python, folder, threads):
        self.name, self.folder = column, folder

    def ask(self, question):
        if question is None:
            if self.name in self.broken:
                raise running.Failed("no such module")
            return {"versions": {"torch": "2"}}
        if "job" in question:
            self.run = COLUMNS[self.name](self.folder).prepare(question["job"])
            return {"ready": True}
        if "end" in question:
            return {"peak_mb": 1.0}
        if (self.name, "run") in self.broken:
            raise running.Failed("out of memory")
        seconds, found = self.run()
        return {"seconds": seconds, "found": found}

    def close(self):
        pass


def bench(folder, output, *options):
    """The command: exit code, standard output, standard error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main(["--model", folder, "--threads", "1", "--repeats", "2", "--output", str(output), *options])
    return ended.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture
def inside(monkeypatch):
    """Workers are in this process; jobs are small."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(running, "Worker", Inside)
    monkeypatch.setattr(
        running, "suite", lambda whole=False: {name: smaller(row) for name, row in suite(whole).items()}
    )
    monkeypatch.setattr(running, "_reviews", lambda: REVIEWS)
    monkeypatch.setattr(Inside, "broken", ())
    monkeypatch.setattr(running, "_multiplies_bfloat16", lambda: False)


def test_the_command_writes_json_and_a_picture_and_goes_on(inside, folder, tmp_path, monkeypatch):
    rows = "score-2,switch-adapter,curve-choices"
    code, out, err = bench(folder, tmp_path, "--only", rows, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert list(result["rows"]) == rows.split(",")
    row = result["rows"]["score-2"]
    assert list(row["columns"]) == ["ours", "peft", "authors", "floor"]
    assert all(len(column["seconds"]) == 2 and column["peak_mb"] == 1 for column in row["columns"].values())
    assert set(row["ratios"]) == {"peft/ours", "authors/ours", "ours/floor"}
    assert all(difference < 1e-4 for difference in row["differences"].values())
    assert [point["at"] for point in result["rows"]["curve-choices"]["points"]["ours"]] == [2, 6, 20, 40, 77]
    assert set(result["left_out"]) == {"adapterhub", "bfloat16"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

    started = []
    monkeypatch.setattr(Inside, "close", lambda self: started.append(self.name))
    code, out, _ = bench(folder, tmp_path, "--only", f"{rows},score-6", "--resume")
    assert code == 0 and "PEFT + Trainer" in out and "scaled linearly" in out
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["rows"].pop("score-6") and again["rows"] == result["rows"]
    assert started == ["ours", "peft", "authors", "floor"]
    bench(folder, tmp_path, "--only", "score-2", "--resume")
    assert len(started) == 4  # nothing was left to do


def test_ctrl_c_leaves_what_is_done(inside, folder, tmp_path, monkeypatch):
    job = running._job

    def until(row, *arguments):
        if row.name == "switch-adapter":
            raise KeyboardInterrupt
        return job(row, *arguments)

    monkeypatch.setattr(running, "_job", until)
    code, _, err = bench(folder, tmp_path, "--only", "load-adapter,switch-adapter")
    assert code == 130 and "go on with --resume" in err
    assert list(json.loads((tmp_path / "bench.json").read_text())["rows"]) == ["load-adapter"]
    monkeypatch.setattr(running, "_job", job)
    assert bench(folder, tmp_path, "--only", "load-adapter,switch-adapter", "--resume")[0] == 0
    assert list(json.loads((tmp_path / "bench.json").read_text())["rows"]) == ["load-adapter", "switch-adapter"]


def test_a_column_that_cannot_start_or_finish_is_said(inside, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Inside, "broken", ("authors", ("peft", "run")))
    code, out, _ = bench(folder, tmp_path, "--only", "score-2,switch-adapter")
    assert code == 0
    assert "Left out: T-Few's authors: no such module." in out
    assert "score 1,000 rows, 2 choices: PEFT + Trainer failed: out of memory" in out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["rows"]["score-2"]["ratios"]) == {"ours/floor"}
    assert result["rows"]["score-2"]["columns"]["peft"] == {"error": "out of memory"}


def test_a_processor_for_bfloat16_has_a_column_more(inside, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_multiplies_bfloat16", lambda: True)
    code, out, _ = bench(folder, tmp_path, "--only", "score-2")
    assert code == 0 and "ia3 in bfloat16 / ia3" in " ".join(out.split())
    row = json.loads((tmp_path / "bench.json").read_text())["rows"]["score-2"]
    assert "bfloat16/ours" in row["ratios"] and 1e-7 < row["differences"]["bfloat16"] < 0.1


def test_peft_that_is_not_installed_is_left_out(inside, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_has_peft", lambda: False)
    code, out, _ = bench(folder, tmp_path, "--only", "switch-adapter")
    assert code == 0 and "Left out: PEFT + Trainer: not installed: pip install peft." in out
    assert list(json.loads((tmp_path / "bench.json").read_text())["rows"]["switch-adapter"]["columns"]) == ["ours"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "score-3"), "Expected rows of the suite (--only), found 'score-3'; close to it: 'score-6'"),
        (("--only", ","), "found none; there are 'import'"),
        (("--only", "help", "--resume"), "to go on from (--resume), found none"),
        (("--only", "help", "--adapterhub", "nowhere"), "(--adapterhub), found 'nowhere'"),
        (("--only", "help", "--model", "./nowhere"), "found no './nowhere' here"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, options, said):
    code, out, err = bench(folder, tmp_path, *options)
    assert code == 2 and not out.strip() and err.count("\n") == 1 and said in err, err


def test_another_run_is_not_gone_on_with(inside, folder, tmp_path):
    assert bench(folder, tmp_path, "--only", "switch-adapter")[0] == 0
    code, _, err = bench(folder, tmp_path, "--only", "switch-adapter", "--resume", "--repeats", "3")
    assert code == 2 and "Expected repeats 2" in err and "found 3" in err
    (tmp_path / "bench.json").write_text("[]")
    code, _, err = bench(folder, tmp_path, "--only", "switch-adapter", "--resume")
    assert code == 2 and "Expected a JSON object in" in err and "start without --resume" in err


def test_commands_and_workers_in_processes_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_has_peft", lambda: False)
    monkeypatch.setattr(running, "_reviews", lambda: REVIEWS)
    code, out, err = bench(folder, tmp_path, "--only", "help,switch-adapter", "--repeats", "1", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    for row in rows.values():
        assert "error" not in row["columns"]["ours"] and row["columns"]["ours"]["peak_mb"] > 0
    assert rows["help"]["columns"]["floor"]["median"] > 0
    assert 1 < rows["help"]["columns"]["floor"]["peak_mb"] < 100  # and not this process's
    assert "torch" in json.loads(out)["versions"]


def test_memory_is_the_peak_over_what_was_there():
    big = torch.ones(10_000_000)
    memory = Memory()
    found = torch.ones(20_000_000) * 2  # two of 80 MB for a moment
    assert 150 < memory.added_mb < 250
    del found, big
    assert Memory().added_mb < 20  # what was before does not count


def test_a_command_that_fails_says_why(folder, tmp_path, monkeypatch):
    row = replace(
        suite()["help"], commands={"ours": "raise ValueError('one\\ntwo')", "floor": "import os; os._exit(3)"}
    )
    monkeypatch.setattr(running, "suite", lambda whole=False: {"help": row})
    code, out, err = bench(folder, tmp_path, "--only", "help", "--json")
    assert code == 0, err
    columns = json.loads(out)["rows"]["help"]["columns"]
    assert columns == {"ours": {"error": "two"}, "floor": {"error": "its process ended with status 3"}}


def test_a_process_that_fails_says_why(folder):
    worker = running.Worker("adapterhub", running.sys.executable, folder, 1)
    try:
        with pytest.raises(running.Failed, match="No module named 'adapters'"):
            worker.ask(None)
    finally:
        worker.close()


def test_a_narrow_screen_shows_whole_jobs():
    screen = Console(file=io.StringIO(), width=80)
    title = "train on 32 examples for 40 steps of 8, evaluate 200 rows, 2 choices"
    ratio = {"median": 2.4, "quartiles": (2.3, 2.5), "memory": 3.1}
    pairs = {f"{name}/ours": ratio for name in report.COLUMNS if name not in ("ours", "floor")} | {"ours/floor": ratio}
    row = {"title": title, "columns": {"ours": {"median": 100.0, "peak_mb": 900}}, "ratios": pairs}
    screen.print(report.table({"rows": {"train-2": row}}))
    require_whole(screen.file.getvalue(), [title])


@pytest.mark.slow
def test_all_columns_in_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_multiplies_bfloat16", lambda: True)
    code, out, err = bench(folder, tmp_path, "--only", "score-2,train-2,mixed", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert set(rows["score-2"]["columns"]) == {"ours", "bfloat16", "peft", "authors", "floor"}
    for row in rows.values():
        assert not any("error" in column for column in row["columns"].values())
        limits = {name: 0.1 if name == "bfloat16" else 1e-3 for name in row["differences"]}
        assert all(difference < limits[name] for name, difference in row["differences"].items())
