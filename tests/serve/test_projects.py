"""Tables that are labelled and trained on: over HTTP, and by clicks."""

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from ia3.errors import InputError
from ia3.files import Mirror
from ia3.serve import job
from ia3.serve.background import COMMAND, Background, Cancelled, Job
from ia3.serve.limits import Limits
from ia3.serve.projects import Project, State, UnknownProject
from ia3.task.reading import read_rows
from support import words

ROWS = words.different(40)
KNOWN = {row["text"]: row["label"] for row in ROWS}


def table(rows=ROWS, more=()) -> str:
    """CSV with a column besides that of the text."""
    lines = [f"{row['text']},{number}" for number, row in enumerate(rows, 1)]
    return "message,number\n" + "\n".join([*lines, *more]) + "\n"


BODY = {"name": "tickets", "table": table(), "column": "message", "labels": ["pos", "neg"]}


@pytest.fixture
def empty(made, tmp_path):
    """A folder with a model and no adapters."""
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    return tmp_path


def project(server, name="tickets") -> dict:
    return server.http.get(f"/v1/projects/{name}").json()


def idle(server, name="tickets") -> dict:
    """The project, when nothing is under way. On a busy machine a process takes long to begin."""
    server.until(lambda: project(server, name)["job"] is None, 300)
    return project(server, name)


def make(server, **changes) -> dict:
    response = server.http.post("/v1/projects", json={**BODY, **changes})
    assert response.status_code == 201, response.text
    return idle(server, response.json()["name"])


def suggested(server, count=10) -> list[dict]:
    return server.http.get(f"/v1/projects/tickets/suggestions?count={count}").json()["rows"]


def label(server, row, given, code=200) -> dict:
    response = server.http.put(f"/v1/projects/tickets/rows/{row}", json={"label": given})
    assert response.status_code == code, response.text
    return response.json()


def said(response) -> str:
    return response.json()["error"]["message"]


def test_a_table_becomes_an_adapter_and_survives_a_restart(empty, start, here):
    server = start(empty)
    assert make(server) | {"job": None} == {
        "name": "tickets", "column": "message", "rows": 40, "labels": {"pos": 0, "neg": 0}, "skipped": 0, "last": None,
        "job": None, "problem": None, "trained": None,
    }  # fmt: skip
    assert server.http.get("/v1/projects/tickets/adapter.zip").status_code == 404
    for _ in range(3):
        for one in suggested(server, 4):
            assert table().splitlines()[one["row"]].startswith(one["text"])
            found = label(server, one["row"], KNOWN[one["text"]])
            assert found["last"] == {**one, "label": KNOWN[one["text"]]}
    assert sum(found["labels"].values()) == 12 and min(found["labels"].values()) > 1
    assert server.http.post("/v1/projects/tickets/training").status_code == 202
    found = idle(server)
    assert found["problem"] is None and found["trained"]["examples"] == 12
    assert 0 <= found["trained"]["accuracy"] <= 1 and 0.5 <= found["trained"]["majority"] < 1

    answer = server.classify("tickets", texts=["the tea was lovely today"]).json()
    assert set(answer["predictions"][0]["probabilities"]) == {"pos", "neg"}
    labelled = server.http.get("/v1/projects/tickets/labels.csv").text
    rows = list(csv.DictReader(io.StringIO(labelled)))
    assert len(rows) == 12 and all(KNOWN[row["message"]] == row["label"] for row in rows)
    assert {row["number"] for row in rows} <= {str(number) for number in range(1, 41)}
    zipped = server.http.get("/v1/projects/tickets/adapter.zip").content
    with zipfile.ZipFile(io.BytesIO(zipped)) as files:
        assert {"tickets/adapter_model.safetensors", "tickets/task.yaml", "tickets/metrics.json"} <= {*files.namelist()}
        weights = files.read("tickets/adapter_model.safetensors")
    assert weights == (empty / "adapters" / "tickets" / "adapter_model.safetensors").read_bytes()
    left = {path.name for path in (empty / "adapters" / ".projects" / "tickets").iterdir()}
    assert left == {"rows.csv", "project.json", "embeddings.npy", "adapter.zip"}

    server.close()
    again = start(empty)
    assert again.http.get("/v1/projects").json() == {"projects": ["tickets"], "refused": None}
    assert project(again) == found
    assert again.classify("tickets", texts=["the tea was lovely today"]).json() == answer
    # Trained again, it replaces the adapter.
    for one in suggested(again, 4):
        label(again, one["row"], KNOWN[one["text"]])
    assert again.http.post("/v1/projects/tickets/training").status_code == 202
    assert idle(again)["trained"]["examples"] == 16
    assert weights != (empty / "adapters" / "tickets" / "adapter_model.safetensors").read_bytes()
    assert again.http.delete("/v1/projects/tickets").status_code == 200
    assert again.http.get("/v1/projects/tickets").status_code == 404
    assert again.classify("tickets").status_code == 200


def test_labels_are_given_skipped_and_taken_back(empty, start, here):
    server = start(empty)
    make(server)
    first, second, *_ = suggested(server)
    label(server, first["row"], "pos")
    assert label(server, second["row"], None)["skipped"] == 1
    assert not {first["row"], second["row"]} & {one["row"] for one in suggested(server, 38)}
    found = server.http.delete(f"/v1/projects/tickets/rows/{second['row']}").json()
    assert found["last"] == {**first, "label": "pos"} and found["skipped"] == 0
    assert server.http.delete(f"/v1/projects/tickets/rows/{second['row']}").status_code == 422
    # A label that comes later, and one that nobody needs.
    assert label(server, first["row"], "fine", 422) and "'pos', 'neg'" in said(
        server.http.put(f"/v1/projects/tickets/rows/{first['row']}", json={"label": "fine"})
    )
    response = server.http.put("/v1/projects/tickets/labels", json={"labels": ["pos", " fine "]})
    assert response.json()["labels"] == {"pos": 1, "fine": 0}
    assert label(server, first["row"], "fine")["labels"] == {"pos": 0, "fine": 1}
    response = server.http.put("/v1/projects/tickets/labels", json={"labels": ["pos", "neg"]})
    assert response.status_code == 422 and "'fine'" in said(response)
    label(server, 41, "pos", 422)


def test_labels_of_the_table_count(empty, start, here):
    server = start(empty)
    lines = [f"{row['text']},{row['label'] if number < 6 else ''}" for number, row in enumerate(ROWS)]
    text = "message,queue\n" + "\n".join([*lines, lines[0], " ,pos"])
    body = {"table": text, "label_column": "queue", "labels": ["neg", "fine"]}
    found = make(server, **body)
    assert found["rows"] == 40 and found["labels"] == {"neg": 3, "fine": 0, "pos": 3} and found["last"] is None
    # Of a text that comes twice, both rows have the label.
    assert len(server.http.get("/v1/projects/tickets/labels.csv").text.splitlines()) == 1 + 7


def test_doubt_decides_what_is_suggested(empty, start, here, monkeypatch):
    from ia3.evaluation import suggesting

    asked, usual = [], suggesting.suggest

    def noting(embeddings, count, probabilities=None, seed=0):
        asked.append(None if probabilities is None else probabilities.shape)
        return usual(embeddings, count, probabilities, seed)

    monkeypatch.setattr(suggesting, "suggest", noting)
    server = start(empty)
    make(server)
    rows = {KNOWN[one["text"]]: one["row"] for one in suggested(server)}
    label(server, rows["pos"], "pos")
    assert len(suggested(server)) == 10
    label(server, rows["neg"], "neg")
    assert len(suggested(server, 100)) == 38
    assert asked == [None, None, (38, 2)]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"table": ""}, "Expected rows in the table, found none"),
        ({"table": "message\n"}, "Expected rows in the table, found none"),
        ({"table": "PK\x03\x04\x00\x00"}, "Expected rows in the table, found none"),
        ({"table": "a,b\n1,2,3\n"}, "Expected 2 values in each row of the table, found 3 (row 1)"),
        ({"table": "a,a\n1,2\n"}, "Expected column names that differ in the table"),
        ({"table": "1.5,x\n2,y\n"}, "Expected the columns' names in the first line, found '1.5'; add a line"),
        ({"table": f"{'I was charged ' * 9}\nNo signal\n"}, "Expected the columns' names in the first line"),
        ({"table": "a,\n1,2\n"}, "Expected the columns' names in the first line, found ''"),
        ({"table": "a\n" + "\n".join(map(str, range(5001)))}, "Expected at most 5000 rows, found more"),
        ({"table": "a\n" + "\n".join([*map(str, range(6000)), "1,2,3"])}, "Expected at most 5000 rows, found more"),
        ({"table": "a,{{ b\n1,2\n"}, "Expected the columns' names in the first line, found '{{ b'"),
        ({"column": "text"}, "Expected a column of 'message', 'number', found 'text'"),
        ({"label_column": "queue"}, "Expected a column of 'message', 'number', found 'queue'"),
        ({"label_column": "message"}, "Expected two columns for text and label"),
        ({"table": "message,number\n ,1\n,2\n"}, "Expected at least 4 different texts in the column 'message', found 0"),
        ({"labels": ["pos"]}, "Expected at least two labels, found 'pos'"),
        ({"labels": []}, "Expected at least two labels, found none"),
        ({"labels": ["pos", ""]}, "labels.1"),
        (
            {"table": f"text,queue\na,{'x' * 61}\nb,y\nc,\nd,", "column": "text", "label_column": "queue"},
            "Expected labels of at most 60 characters, found 'xxx",
        ),
        ({"labels": ["good_news", "good news"]}, "good news"),
        ({"labels": [str(number) for number in range(51)]}, "Expected at most 50 labels, found 51"),
        ({"name": "a/b"}, "without slashes"),
        ({"name": "../up"}, "Expected an adapter's name"),
        ({"name": ".hidden"}, "Expected an adapter's name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_a_line(running, changes, says):
    response = running.http.post("/v1/projects", json={**BODY, **changes})
    assert response.status_code == 422 and says in said(response), response.text
    assert "\n" not in said(response) and "/tmp" not in said(response)
    assert running.http.get("/v1/projects").json()["projects"] == []


def test_a_table_is_described_before_anything_is_kept(running):
    body = {"table": "text;queue\nTea is hot;a\nSoup;b\nCake;a\n;b\n"}
    assert running.http.post("/v1/tables", json=body).json() == {
        "rows": 4,
        "columns": [
            {"name": "text", "filled": 3, "examples": ["Tea is hot", "Soup", "Cake"], "labels": None},
            {"name": "queue", "filled": 4, "examples": ["a", "b"], "labels": ["a", "b"]},
        ],
    }
    assert running.http.post("/v1/tables", json={"table": "a,b\n1,2,3\n"}).status_code == 422


def test_names_that_are_taken(empty, made, start, here):
    shutil.copytree(made / "adapters" / "tea", empty / "adapters" / "tea")
    server = start(empty)
    make(server)
    for name in ("tea", "tickets", "model"):
        assert server.http.post("/v1/projects", json={**BODY, "name": name}).status_code == 409
    assert server.classify("tea").status_code == 200


def test_training_is_refused_where_uploads_are(made, start, tmp_path, monkeypatch):
    monkeypatch.setenv("IA3_CACHE", str(tmp_path / "cache"))
    mirror = Mirror(f"file://{made}/adapters", ("adapter_config.json", "adapter_model.safetensors", "task.yaml"))
    mirror.refresh()
    server = start(made, mirror=mirror)
    assert "copies them from elsewhere" in server.http.get("/v1/projects").json()["refused"]
    assert server.http.post("/v1/projects", json=BODY).status_code == 507


def test_an_engine_without_memory_for_training_refuses_it(empty, start):
    server = start(empty)
    server.engine.source = None
    assert "--engine local" in server.http.get("/v1/projects").json()["refused"]
    assert server.http.post("/v1/projects", json=BODY).status_code == 422


def test_a_token_and_limits_hold_here_too(empty, start):
    server = start(empty, token="right-token", limits=Limits(body_bytes=1000))
    for path in ("/v1/projects", "/v1/projects/tickets/labels.csv"):
        assert server.http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert server.http.post("/v1/projects", json=BODY).status_code == 413
    assert server.http.get("/page.js", headers={"Authorization": ""}).status_code == 200


def test_labels_that_are_too_few(empty, start, here):
    server = start(empty)
    make(server, labels=["pos", "neg", "fine"])
    for row in (1, 3):
        label(server, row, "pos")
    response = server.http.post("/v1/projects/tickets/training")
    assert response.status_code == 422
    assert "at least 2 rows of each label, found 0 of 'neg', 0 of 'fine'; label more rows, or remove" in said(response)
    assert project(server)["job"] is None


def test_what_fails_is_said_and_the_adapter_stays(empty, start, here, monkeypatch):
    monkeypatch.setattr(job, "_MOST_OF_A_LABEL", 3)
    server = start(empty)
    make(server)
    for row in range(1, 9):
        label(server, row, KNOWN[ROWS[row - 1]["text"]])
    server.http.post("/v1/projects/tickets/training")
    before = idle(server)
    assert before["trained"]["examples"] == 6 and before["trained"]["labelled"] == 8

    def failing(*_, output, **__):
        raise InputError(f"Expected memory, found none in {output}.")

    monkeypatch.setattr(job, "train", failing)
    server.http.post("/v1/projects/tickets/training")
    found = idle(server)
    assert found["problem"].startswith("Expected memory") and str(empty) not in found["problem"]
    assert found["trained"] == before["trained"] and server.classify("tickets").status_code == 200
    assert server.http.delete("/v1/projects/tickets/training").status_code == 422  # nothing is under way


def test_a_damaged_project_is_named_and_can_be_removed(empty, start, here):
    server = start(empty)
    make(server)
    server.close()
    (empty / "adapters" / ".projects" / "tickets" / "project.json").write_text('{"column": 3}')
    again = start(empty)
    response = again.http.get("/v1/projects/tickets")
    assert response.status_code == 422 and "project.json" in said(response) and str(empty) not in said(response)
    assert again.http.delete("/v1/projects/tickets").status_code == 200
    assert again.http.get("/v1/projects").json()["projects"] == []


@pytest.mark.parametrize("changes", [{"column": "text"}, {"given": {"41": "pos"}}])
def test_a_project_of_another_table_is_named(empty, start, here, changes):
    server = start(empty)
    make(server)
    server.close()
    path = empty / "adapters" / ".projects" / "tickets" / "project.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    response = start(empty).http.get("/v1/projects/tickets")
    assert response.status_code == 422 and "project.json and rows.csv of one table" in said(response)


def test_one_server_has_the_projects_of_a_folder(empty, start, here):
    first, second = start(empty), start(empty)
    assert first.http.get("/v1/projects").json()["refused"] is second.http.get("/v1/projects").json()["refused"] is None
    make(first)
    for response in (
        second.http.get("/v1/projects/tickets"),
        second.http.put("/v1/projects/tickets/rows/1", json={"label": "pos"}),
        second.http.delete("/v1/projects/tickets"),
        second.http.post("/v1/projects", json={**BODY, "name": "other"}),
    ):
        assert response.status_code == 409 and said(response).startswith("Another server has the projects")
    assert second.http.get("/v1/projects").json()["refused"].startswith("Another server has the projects")
    assert second.http.get("/v1/projects/soup").status_code == 404
    label(first, 1, "pos")
    first.close()
    assert project(second)["labels"] == {"pos": 1, "neg": 0}
    assert label(second, 2, "neg")["labels"] == {"pos": 1, "neg": 1}


def test_a_removed_project_does_not_come_back(empty, start, here):
    server = start(empty)
    make(server)
    projects = server.server.projects
    held = server.call(projects.get("tickets"))  # as by a request that is under way
    assert server.http.delete("/v1/projects/tickets").status_code == 200
    for work in (held.give(1, "pos"), projects.suggest(held, 3)):
        with pytest.raises(UnknownProject):
            server.call(work)
    assert not (empty / "adapters" / ".projects" / "tickets").exists()


def test_labels_that_look_like_templates(empty, start, here):
    server = start(empty)
    names = {"pos": "{{ range(9) }}", "neg": "{% b"}
    make(server, labels=[*names.values()])
    for row in range(1, 9):
        label(server, row, names[KNOWN[ROWS[row - 1]["text"]]])
    server.http.post("/v1/projects/tickets/training")
    assert idle(server)["problem"] is None
    answer = server.classify("tickets", texts=["the tea was lovely today"]).json()
    assert set(answer["predictions"][0]["probabilities"]) == {*names.values()}


def test_the_labels_file_is_read_as_it_was(tmp_path):
    rows = [{"text": "a\rb", "more": 'x "y"\n'}, {"text": "c", "more": ""}]
    state = State(column="text", label_column="label", labels=["p", "q"], given={1: "p", 2: "q"}, from_table=0)
    path = tmp_path / "labels.csv"
    path.write_text(Project(tmp_path, state, rows).labels_file(), encoding="utf-8", newline="")
    assert read_rows(path) == [{**row, "label": label} for row, label in zip(rows, "pq", strict=True)]


@pytest.mark.parametrize(
    "method, path, says",
    [
        ("GET", "suggestions?count=0", "Cannot use the address: count: Input should be greater than or equal to 1."),
        ("DELETE", "rows/abc", "Cannot use the address: row: Input should be a valid integer"),
    ],
)
def test_what_is_wrong_in_an_address_is_said_as_all_else(running, method, path, says):
    response = running.http.request(method, f"/v1/projects/tickets/{path}")
    assert response.status_code == 422 and said(response).startswith(says)
    assert response.json()["error"]["code"] == "invalid"


# The process of a job, in place of which a few lines stand.


def background(lines: str) -> Background:
    begin = "import json, sys, time; job = json.loads(sys.stdin.readline()); say = lambda **line: print(json.dumps(line), flush=True)\n"
    return Background((sys.executable, "-c", begin + lines))


def test_a_job_tells_how_it_gets_on(running):
    step = "say(stage='Training', done=3, total=9, note='loss 1'); say(result=job)"
    given = Job("read")
    assert running.call(background(step).run(given, {"texts": ["ä"]})) == {"kind": "read", "texts": ["ä"]}
    assert given.to_dict() == {"kind": "read", "stage": "Training", "done": 3, "total": 9, "note": "loss 1"}


@pytest.mark.parametrize(
    "lines, says",
    [
        ("say(problem='Expected tea, found soup.')", "Expected tea, found soup."),
        ("sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9, perhaps because memory is full"),
    ],
)
def test_a_job_that_fails(running, lines, says):
    with pytest.raises(InputError, match=says):
        running.call(background(lines).run(Job("read"), {}))


def test_the_end_of_what_a_process_says_is_logged(running, caplog):
    lines = "print('x' * 200_000, file=sys.stderr); print('Illegal tea', file=sys.stderr); sys.exit(3)"
    with pytest.raises(InputError, match="exit code 3"):
        running.call(background(lines).run(Job("read"), {}))
    (found,) = (record.fields for record in caplog.records if record.message == "a job has failed")
    assert found["lines"][-1] == "Illegal tea" and found["code"] == 3 and len("".join(found["lines"])) < 5000


def test_modules_in_the_working_directory_are_not_run(running, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="It ended by an error: 'nothing'"):
        running.call(Background().run(Job("nothing"), {}))


def test_one_job_at_a_time_and_each_can_be_cancelled(running):
    import asyncio

    runs = background("say(stage='x', done=0, total=0, note=''); time.sleep(600)")
    first, second, third = Job("train"), Job("train"), Job("train")

    async def work():
        tasks = [asyncio.ensure_future(runs.run(each, {})) for each in (first, second, third)]
        while first.stage != "x":
            await asyncio.sleep(0.01)
        assert second.stage.startswith("Waiting")
        second.cancel()
        with pytest.raises(Cancelled):  # at once, not when its turn has come
            await tasks[1]
        first.cancel()
        while third.stage != "x":
            await asyncio.sleep(0.01)
        third.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(each) for each in running.call(work())] == [Cancelled] * 3


def test_training_waits_for_reading_and_a_removed_project_ends_both(empty, start, monkeypatch):
    monkeypatch.setattr(Background.__init__, "__defaults__", (background("time.sleep(600)")._command,))
    server = start(empty)
    assert server.http.post("/v1/projects", json=BODY).json()["job"]["kind"] == "read"
    for row in range(1, 9):
        label(server, row, KNOWN[ROWS[row - 1]["text"]])
    assert suggested(server) == []
    found = server.http.post("/v1/projects/tickets/training").json()["job"]
    assert found["kind"] == "train" and found["stage"].startswith("Waiting")
    response = server.http.post("/v1/projects/tickets/training")
    assert response.status_code == 409 and "being trained already" in said(response)
    assert server.http.delete("/v1/projects/tickets/training").json()["job"]["kind"] == "read"
    server.http.post("/v1/projects/tickets/training")
    assert server.http.delete("/v1/projects/tickets").status_code == 200
    assert server.http.get("/v1/projects").json()["projects"] == []


@pytest.mark.slow
def test_the_real_process(empty, start):
    """Reading, training, cancelling, and a server that ends meanwhile."""
    server = start(empty)
    make(server)
    for one in suggested(server, 12):
        label(server, one["row"], KNOWN[one["text"]])
    server.http.post("/v1/projects/tickets/training")
    assert server.http.post("/v1/projects/tickets/training").status_code == 409
    server.until(lambda: project(server)["job"]["total"] > 0, 300)
    assert server.classify("tickets").status_code == 404  # and meanwhile others would be answered
    assert server.http.delete("/v1/projects/tickets/training").json()["job"] is None
    assert server.http.post("/v1/projects/tickets/training").status_code == 202
    found = idle(server)
    assert found["problem"] is None and found["trained"]["examples"] == 12
    assert server.classify("tickets", texts=["the tea was lovely today"]).status_code == 200
    server.http.post("/v1/projects/tickets/training")
    server.close()
    left = {path.name for path in (empty / "adapters" / ".projects" / "tickets").iterdir()}
    assert left == {"rows.csv", "project.json", "embeddings.npy", "adapter.zip"}


@pytest.mark.slow
def test_the_process_ends_with_whoever_started_it(empty):
    command = COMMAND
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    task = {"kind": "train", "name": "x", "rows": rows, "column": "text", "label_column": "label"}
    task |= {"model": str(empty / "nothing"), "dtype": "auto", "output": str(empty)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
        lines = [json.loads(line) for line in process.stdout]
    assert "Expected" in lines[-1]["problem"] or "Cannot" in lines[-1]["problem"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdin.write(json.dumps(task | {"model": str(empty / "model")}).encode() + b"\n")
        process.stdin.close()
        assert process.wait(300) == 1
    assert not (empty / "adapter.zip").exists()


# The page.


@pytest.fixture
def page(browser):
    """A page that has no errors, and asks nobody but its server."""
    made = browser.new_page()
    made.set_default_timeout(30_000)
    errors, asked = [], []
    made.on("pageerror", lambda error: errors.append(error))
    made.on("request", lambda request: asked.append(request.url))
    yield made
    assert not errors
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:")) for url in asked)
    made.close()


def press(page, key) -> str:
    """Press a key, and wait for another text, which is returned."""
    before = page.locator("#row-text").inner_text()
    page.keyboard.press(key)
    page.wait_for_function("text => document.getElementById('row-text').textContent !== text", arg=before)
    return page.locator("#row-text").inner_text()


def test_from_a_pasted_table_to_an_adapter_by_clicks(empty, start, page, here):
    server = start(empty)
    page.goto(server.url)
    # Without adapters, this comes first. What is wrong is said in a line.
    page.fill("#table", "a,b\n1,2,3")
    page.get_by_role("alert").filter(has_text="Expected 2 values in each row of the table").wait_for()
    page.get_by_role("textbox", name="Table").fill(table())
    page.get_by_text("40 rows with 2 columns.").wait_for()
    assert page.input_value("#column") == "message"
    page.get_by_role("textbox", name="Labels one a line").fill("pos\nneg\nfine")
    page.get_by_role("button", name="Start labelling").click()
    page.get_by_role("alert").filter(has_text="Give the project a name").wait_for()
    page.get_by_role("textbox", name="Name letters").fill("tickets")
    page.get_by_role("button", name="Start labelling").click()
    page.locator("#row-number", has_text="Row ").wait_for()

    text = page.locator("#row-text").inner_text()
    assert text in KNOWN
    after = press(page, "2")
    assert press(page, "u") == text  # the row comes back
    assert press(page, "s") == after
    for number in range(11):
        text = page.locator("#row-text").inner_text()
        if number % 2:
            press(page, "12"[KNOWN[text] == "neg"])
        else:
            page.get_by_role("button", name=KNOWN[text]).click()
            page.wait_for_function("text => document.getElementById('row-text').textContent !== text", arg=text)
    page.get_by_text("11 rows labelled of 40, 1 skipped.").wait_for()
    page.reload()
    page.get_by_text("11 rows labelled of 40, 1 skipped.").wait_for()

    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("alert").filter(has_text="found 0 of 'fine'").wait_for()
    page.get_by_text("Change the labels").click()
    page.get_by_role("textbox", name="Labels one a line").fill("pos\nneg")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="fine").wait_for(state="detached")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text("of 11 labelled rows").wait_for()
    assert project(server)["trained"]["examples"] == 11

    page.get_by_role("textbox", name="Try it on a text").fill("the tea was lovely today")
    page.get_by_role("button", name="Classify").click()
    page.locator("#said .row").first.wait_for()
    found = server.classify("tickets", texts=["the tea was lovely today"]).json()["predictions"][0]["probabilities"]
    best = sorted(found.items(), key=lambda item: -item[1])
    shown = page.locator("#said .row").all_inner_texts()
    assert [text.split() for text in shown] == [[name, f"{100 * p:.1f}", "%"] for name, p in best]
    for name, file in (("Download labels (CSV)", "tickets-labels.csv"), ("Download adapter (zip)", "tickets.zip")):
        with page.expect_download() as loading:
            page.get_by_role("button", name=name).click()
        assert loading.value.suggested_filename == file
        its = server.http.get(f"/v1/projects/tickets/{'labels.csv' if 'CSV' in name else 'adapter.zip'}").content
        with open(loading.value.path(), "rb") as saved:
            assert saved.read() == its
    page.get_by_role("link", name="Try").click()
    page.get_by_text("1 adapter of model").wait_for()
    page.get_by_role("link", name="Train").click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("link", name="tickets").click()
    page.get_by_role("button", name="Delete project").click()
    page.get_by_text("New project").wait_for()
    page.locator("#known").wait_for(state="hidden")


def test_an_answer_about_one_project_changes_no_other(empty, start, page, here):
    server = start(empty)
    make(server)
    make(server, name="other")
    page.goto(f"{server.url}/#project/tickets")
    page.locator("#row-number", has_text="Row ").wait_for()
    waiting = []
    page.route("**/rows/*", lambda route: waiting.append(route))
    with page.expect_request("**/rows/*"):
        page.keyboard.press("1")
    page.evaluate("location.hash = 'project/other'")
    page.locator("#project-name", has_text="other").wait_for()
    page.locator("#row-number", has_text="Row ").wait_for()
    before = page.locator("#row-text").inner_text()
    with page.expect_response("**/rows/*"):
        waiting[0].continue_()
    page.unroute("**/rows/*")
    server.until(lambda: sum(project(server)["labels"].values()) == 1)
    # What is labelled now is the row that is shown.
    page.wait_for_timeout(300)
    assert page.locator("#row-text").inner_text() == before
    assert page.locator("#project-name").inner_text() == "other"
    press(page, "2")
    assert project(server, "other")["last"]["text"] == before


def test_a_file_is_picked_with_a_token_on_a_narrow_screen(empty, start, page, here):
    server = start(empty, token="right-token")
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(f"{server.url}/#train")
    page.get_by_role("alert").filter(has_text="Bearer").wait_for()
    page.fill("#token", "right-token")
    page.press("#token", "Tab")
    page.get_by_text("New project").wait_for()
    page.set_input_files(
        "#file", {"name": "old.csv", "mimeType": "text/csv", "buffer": "text\ncaf\xe9".encode("latin-1")}
    )
    page.get_by_role("alert").filter(has_text="old.csv is not text in UTF-8").wait_for()
    lines = "\n".join(f"{row['text']},<img src=x onerror=alert(1)>{number % 2}" for number, row in enumerate(ROWS))
    buffer = f"text,label\n{lines}".encode()
    page.set_input_files("#file", {"name": "my tickets.csv", "mimeType": "text/csv", "buffer": buffer})
    page.get_by_text("40 rows with 2 columns.").wait_for()
    assert page.input_value("#name") == "my-tickets" and page.input_value("#label-column") == "label"
    assert page.input_value("#labels").splitlines() == [f"<img src=x onerror=alert(1)>{number}" for number in (0, 1)]
    page.get_by_role("button", name="Start labelling").click()
    page.get_by_text("There are no further rows.").wait_for()
    page.get_by_text("40 rows labelled of 40.").wait_for()
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
