"""The launch scripts: lint, dry runs, and what ``supervise.sh`` makes of exit codes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def run(*command, **environment):
    # Only what the test says: the scripts read common names such as NAME and ZONE.
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_lint(script):
    assert os.access(script, os.X_OK)
    command = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = run(*command, str(script))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "step", ["create", "wait", "install", "run", "up", "watch", "logs", "stop", "delete", "status"]
)
@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_dry_run(step, accelerator, runtime):
    done = run(
        str(LAUNCH / "tpu_vm.sh"), "--dry-run", step, "--", "--config.train.seeds=8",
        ACCELERATOR=accelerator, BUCKET="a-bucket",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if step == "create":
        assert f"--accelerator-type={accelerator} --runtime-version={runtime} --spot" in done.stdout
    if step == "run":
        assert "--worker=all" in done.stdout
        assert "--coordinator=auto --config.train.seeds=8" in done.stdout
        assert "--workdir=/mnt/seal/runs/seal" in done.stdout
    if step == "up":
        verbs = [line.split(" seal")[0].split()[-1] for line in done.stdout.splitlines()]
        assert verbs[:2] == ["create", "describe"]
        assert "supervise.sh" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORKDIR": "gs://bucket/run"}, "must be a folder"),
        ({"WORKDIR": "runs"}, "must be an absolute path"),
        ({}, "give BUCKET, or a WORKDIR"),
        ({"BUCKET": "b", "ACCELERATOR": "v2-8"}, "RUNTIME must be given"),
        ({"BUCKET": "b", "COMMAND": "compare"}, "must be train or sweep"),
    ],
)
def test_bad_input(environment, message):
    done = run(str(LAUNCH / "tpu_vm.sh"), "--dry-run", "up", **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "runs", "code"),
    [("0", 1, 0), ("75 75 1 0", 4, 0), ("2 0", 1, 2), ("137 0", 2, 0), ("1 75 1 75 1 0", 5, 1)],
)
def test_supervise(tmp_path, codes, runs, code):
    command = 'echo x >>runs; set -- $CODES; shift $(($(wc -l <runs) - 1)); exit "$1"'
    done = run(
        "bash", "-c", f'cd {tmp_path} && {LAUNCH}/supervise.sh bash -c "$1"', "_", command,
        CODES=codes, RESTART_DELAY="0", MAX_FAILURES="3",
    )  # fmt: skip
    assert (done.returncode, (tmp_path / "runs").read_text().count("x")) == (code, runs)


def test_supervise_passes_the_signal_on(tmp_path):
    """The command is given the time to save, and is not started again."""
    command = (
        'trap "sleep 0.5; echo saved; exit 75" TERM; echo ready; while true; do sleep 0.1; done'
    )
    environment = {**os.environ, "PID_FILE": str(tmp_path / "pid")}
    with subprocess.Popen(
        [LAUNCH / "supervise.sh", "bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as supervisor:
        assert supervisor.stdout.readline() == "ready\n"
        second = run(str(LAUNCH / "supervise.sh"), "true", PID_FILE=environment["PID_FILE"])
        assert second.returncode == 2
        assert "still running" in second.stderr
        time.sleep(0.2)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.stdout.read() == "saved\n"
        assert supervisor.wait() == 75


def test_gke():
    yaml = pytest.importorskip("yaml")
    claim, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {2: "FailJob", 75: "Ignore"}
    assert all(
        rule["onExitCodes"]["containerName"] == container["name"]
        for rule in rules
        if "onExitCodes" in rule
    )
    assert pod["restartPolicy"] == "Never"  # Kubernetes refuses a podFailurePolicy otherwise
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": 8}
    (workdir,) = (word for word in container["args"] if word.startswith("--workdir="))
    assert workdir.startswith(f"--workdir={container['volumeMounts'][0]['mountPath']}/")
