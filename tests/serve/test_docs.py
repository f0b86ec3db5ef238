"""The requests of the documentation, against a server that is set up as docs/serve.md says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from ia3 import IA3Config, get_peft_model, load_base
from ia3.serve.limits import Limits
from support.paths import ROOT
from support.serving import save_adapter

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ALL = PAGE + "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("ten-minutes.md", "tenants.md"))
BLOCKS = dict(re.findall(r"<!-- example: ([\w.-]+) -->\n```\w+\n(.*?)^```$", ALL, re.MULTILINE | re.DOTALL))


@pytest.fixture
def tickets(made, tmp_path):
    """A folder with a model, and in `adapters` two adapters."""
    shutil.copytree(made / "model", tmp_path / "model")
    model = get_peft_model(load_base(str(tmp_path / "model"))[0], IA3Config(task_type="CAUSAL_LM"))
    choices = {"billing": "bill", "technical": "fault"}
    for seed, name in enumerate(("tickets", "acme")):
        save_adapter(tmp_path / "adapters" / name, model, seed, template="{{ message }} ?", choices=choices)
    return tmp_path


def test_requests(tickets, start, monkeypatch):
    monkeypatch.chdir(tickets)
    server = start(tickets)
    answers = {}
    for name in (
        "serve-classify",
        "serve-completions",
        "serve-adapters",
        "serve-project",
        "serve-operation",
        "ten-minutes-ask",
        "tenants-ask",
    ):
        for command in BLOCKS[name].strip().splitlines():
            program, *arguments = shlex.split(command.replace("localhost:8000", f"127.0.0.1:{server.port}"))
            assert program == "curl"
            done = subprocess.run(
                ["curl", "--silent", "--show-error", "--fail-with-body", *arguments], capture_output=True, text=True
            )
            assert not done.returncode, (command, done.stdout, done.stderr)
            answers.setdefault(name, []).append(done.stdout)
    labels = json.loads(answers["serve-classify"][0])["predictions"][0]["probabilities"]
    assert set(labels) == {"billing", "technical"}
    assert json.loads(answers["serve-classify"][1])["predictions"][0]["label"] is None
    for name, adapter in (("ten-minutes-ask", "tickets"), ("tenants-ask", "acme")):
        said = json.loads(answers[name][0])
        assert said["adapter"] == adapter and said["predictions"][0]["label"] in {"billing", "technical"}
    for number, count, names in ((3, 2, ["tickets"]), (4, 1, ["acme", "tickets"])):
        said = json.loads(answers["serve-classify"][number])
        assert said["adapters"] == names and len(said["predictions"]) == count
        assert set(said["predictions"][0]["tickets"]["probabilities"]) == {"billing", "technical"}
    assert answers["serve-completions"][2].endswith("data: [DONE]\n\n")
    assert json.loads(answers["serve-adapters"][-1]) == {"name": "uploaded", "deleted": True}
    assert json.loads(answers["serve-project"][-2])["labels"] == {"billing": 2, "technical": 2}
    assert answers["serve-project"][-1].splitlines()[:2] == ["message,day,label", "I was charged twice,Mon,billing"]


def test_openai(tickets, start, capsys):
    server = start(tickets)
    server.engine.decoder.ends = set()  # it might say nothing
    code = BLOCKS["serve-openai"].replace("localhost:8000", f"127.0.0.1:{server.port}")
    exec(compile(code, "serve-openai", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_address(tickets, monkeypatch, capsys):
    from ia3.cli import main

    monkeypatch.setenv("IA3_CACHE", str(tickets / "cache"))
    command = BLOCKS["serve-address"].splitlines()[1].replace("s3://bucket", f"file://{tickets}")
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], "--model", str(tickets / "model"), "--json"])
    assert not ended.value.code and set(json.loads(capsys.readouterr().out)[0]["probabilities"]) == {
        "billing",
        "technical",
    }


def test_commands_and_files_name_options_that_there_are(capsys, monkeypatch):
    from ia3.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    lines = [
        *BLOCKS["serve"].splitlines(),
        *BLOCKS["ten-minutes-serve"].splitlines(),
        BLOCKS["serve-address"].splitlines()[0],
        *(line for line in BLOCKS["ia3.service"].splitlines() if "ExecStart" in line),
    ]
    lines += [
        " ".join(json.loads(line.removeprefix("CMD")))
        for line in BLOCKS["Dockerfile"].splitlines()
        if line.startswith("CMD")
    ]
    assert len(lines) == 6
    for line in lines:
        assert "ia3 serve" in line and set(re.findall(r"--[a-z-]+", line)) <= known
    # systemd makes the folder that the command names.
    unit = dict(line.split("=", 1) for line in BLOCKS["ia3.service"].splitlines() if "=" in line)
    assert f"--adapters /var/lib/{unit['StateDirectory']} " in unit["ExecStart"]
    assert unit["Environment"] == f"IA3_CACHE=/var/cache/{unit['CacheDirectory']}"
    seconds = re.search(r"--stop-timeout (\d+)", PAGE)
    assert seconds and int(seconds[1]) == int(unit["TimeoutStopSec"]) > Limits().deadline + 5
    extras = (ROOT / "pyproject.toml").read_text()
    assert "\nserve = [" in extras and re.search(r"\[[a-z,]*\bserve\]", BLOCKS["Dockerfile"])


@pytest.mark.slow
def test_without_arguments(tmp_path):
    """`ia3 serve` alone: the embedded model, and whatever lies in ./adapters."""
    command = [
        sys.executable,
        "-c",
        "from ia3.cli import main; main()",
        *shlex.split(BLOCKS["serve"].splitlines()[0])[1:],
    ]
    with subprocess.Popen([*command, "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if '"listening"' in line)
            address = json.loads(line)["address"]
            waiting = ["curl", "--silent", "--fail", "--retry", "300", "--retry-delay", "1", f"{address}/ready"]
            assert subprocess.run(waiting, capture_output=True).returncode == 0
            body = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0,
                    "max_tokens": 12}  # fmt: skip
            asking = ["curl", "--silent", f"{address}/v1/chat/completions", "--json", json.dumps(body)]
            answer = json.loads(subprocess.run(asking, capture_output=True, text=True).stdout)
            assert "Paris" in answer["choices"][0]["message"]["content"]
        finally:
            process.terminate()
        assert process.wait(60) == 0
