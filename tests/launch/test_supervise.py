"""The shell scripts: lint, and what ``supervise.sh`` makes of exit codes."""

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
    ("codes", "runs", "code", "more"),
    [
        ("0", 1, 0, {}), ("75 75 1 0", 4, 0, {}), ("2 0", 1, 2, {}), ("137 0", 2, 0, {}),
        ("1 75 1 75 1 0", 5, 1, {}), ("1 1 1 0", 3, 2, {"GIVE_UP_CODE": "2"}),
    ],
)  # fmt: skip
def test_supervise(tmp_path, codes, runs, code, more):
    command = 'echo x >>runs; set -- $CODES; shift $(($(wc -l <runs) - 1)); exit "$1"'
    done = run(
        "bash", "-c", f'cd {tmp_path} && {LAUNCH}/supervise.sh bash -c "$1"', "_", command,
        CODES=codes, RESTART_DELAY="0", MAX_FAILURES="3", **more,
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
