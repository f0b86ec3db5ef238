"""The files of docs/replicas.md: what they name exists, and their times fit the server's."""

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from ia3.cli import main
from ia3.files import CONFIG_NAME, WEIGHTS_NAME
from ia3.serve import run, start
from ia3.serve.limits import Limits
from support.paths import ROOT

EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "replicas.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- example: ([\w-]+) -->\n```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    """The objects of the manifest, by kind."""
    found = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert all(each["apiVersion"] and each["metadata"]["name"] for each in found)
    return {each["kind"]: each for each in found}


@pytest.fixture
def pod(manifest) -> dict:
    return manifest["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def options(pod) -> dict[str, str]:
    """The options of the command line."""
    program, command, *rest = pod["containers"][0]["command"]
    assert (program, command) == ("ia3", "serve")
    return dict(each.split("=", 1) for each in rest)


def test_commands_have_options_and_files_that_there_are(options, pod, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options.keys() <= known
    commands = BLOCKS["replicas"].splitlines()
    assert len(commands) == 2 and all(set(re.findall(r"--[a-z-]+", line)) <= known for line in commands)
    secret, apply = BLOCKS["kubernetes"].splitlines()
    (its,) = (each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each)
    assert secret.startswith(
        f"kubectl create secret generic {its} --from-literal={os.path.basename(options['--token-file'])}="
    )
    assert (ROOT / apply.split()[-1]).samefile(EXAMPLES / "kubernetes.yaml")
    assert (
        "".join(line[2:].strip() for line in (EXAMPLES / "kubernetes.yaml").open() if "kubectl create" in line)
        == secret
    )
    folder, _, run_it = BLOCKS["ray-serve"].strip().partition(" && ")
    assert (folder, run_it) == ("cd examples", "serve run ray_serve.yaml")


def test_the_probes_ask_what_needs_no_token(pod, options, made, start):
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == int(options["--port"])
    server = start(made, token="right-token")
    anonymous = {"Host": "10.0.0.7:8000"}  # as a kubelet asks
    for name, path in (("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        probe = container[name]["httpGet"]
        assert probe == {"path": path, "port": port["name"]}
        assert httpx.get(server.url + probe["path"], headers=anonymous).status_code == 200
    annotations = {"prometheus.io/path": "/metrics", "prometheus.io/port": options["--port"]}
    assert server.http.get(annotations["prometheus.io/path"]).status_code == 200


def test_the_times_fit_each_other(manifest, pod, options):
    probe = pod["containers"][0]["readinessProbe"]
    drain, deadline = float(options["--drain"]), float(options["--deadline"])
    assert probe["periodSeconds"] * probe["failureThreshold"] * 2 < drain
    assert pod["terminationGracePeriodSeconds"] >= drain + deadline + 5 + 2 * run._READING_SECONDS
    rolling = manifest["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0 < rolling["maxSurge"]


def test_what_the_manifest_joins_has_the_same_name(manifest, pod, options):
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest[kind]["spec"]["selector"]["matchLabels"] == labels
    assert manifest["Service"]["spec"]["selector"] == labels
    (container,) = pod["containers"]
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert options["--adapters"] == mounts["adapters"]
    assert os.path.dirname(options["--token-file"]) == mounts["token"]
    assert {"name": "IA3_CACHE", "value": mounts["cache"]} in container["env"]
    claim = manifest["PersistentVolumeClaim"]
    assert volumes["adapters"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_ray_serves_file():
    config = yaml.safe_load((EXAMPLES / "ray_serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    source = (EXAMPLES / f"{module}.py").read_text(encoding="utf-8")
    assert f"\ndef {name}(" in source
    assert application["args"].keys() <= inspect.signature(start.open_server).parameters.keys()
    (deployment,) = application["deployments"]
    assert f"\nclass {deployment['name']}:" in source
    assert deployment["graceful_shutdown_timeout_s"] > Limits().deadline + 5


@pytest.mark.slow
def test_ray_serves_replicas(place):
    """Needs Ray Serve: pip install "ray[serve]"."""
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    config = yaml.safe_load((EXAMPLES / "ray_serve.yaml").read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["http_options"]["port"] = free.getsockname()[1]
    (application,) = config["applications"]
    application["args"] |= {"model": str(place / "model"), "adapters": str(place / "adapters"), "refresh": 0.5}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.1
    (place / "ray.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(place / "ray.yaml")]
    environment = {**os.environ, "RAY_TMPDIR": str(place.parent.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    log = (place / "log").open("w+")
    with log, subprocess.Popen(command, cwd=EXAMPLES, env=environment, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{config['http_options']['port']}", timeout=60) as http:
                until(lambda: http.get("/ready").status_code == 200, process, place / "log")
                files = [
                    ("files", (name, (place / "adapters" / "cake" / name).read_bytes()))
                    for name in (CONFIG_NAME, WEIGHTS_NAME, "task.yaml")
                ]
                assert http.post("/v1/adapters", data={"name": "new"}, files=files).status_code == 201
                time.sleep(1.5)
                for name in ["new", "tea"] * 8:  # of either replica
                    body = {"adapter": name, "texts": ["the tea was lovely"]}
                    answer = http.post("/v1/classify", json=body)
                    assert answer.status_code == 200, answer.text
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def until(condition, process, log) -> None:
    end = time.monotonic() + 240
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
