"""A TPU request over its life: what a host does when it boots, and what --watch does when a slice is lost."""

import os
import shlex
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from launch import tpu

RUN = ("tpu", "run", "--zone=z", "--watch", "--", "train", "--config=configs/quickstart.py:seal")
SWEEP = ("tpu", "run", "--zone=z", "--watch", "--", "sweep", "--config=configs/quickstart.py")
BUCKET = "--workdir=gs://bucket/runs/quick"
# What the installer of uv leaves behind: a uv whose environments have a "python" that is the training.
UV = r"""
mkdir -p "$HOME/.local/bin"
cat >"$HOME/.local/bin/uv" <<'END'
#!/bin/bash
if [[ $1 == venv ]]; then
  mkdir -p venv/bin
  printf '#!/bin/bash\n%s\n' "$TRAINING" >venv/bin/python
  chmod +x venv/bin/python
  eval "$PREPARING"
fi
END
chmod +x "$HOME/.local/bin/uv"
"""


@pytest.fixture
def host(launch, fakes, tmp_path, monkeypatch):
    """Boot a host: its script in a process, with stand-ins for what the machine has."""
    assert (
        launch(*[word for word in RUN if word != "--watch"], BUCKET, "--config.train.seeds=2")[0]
        == 0
    )
    (script,) = fakes.calls()[-1]["files"]
    home = tmp_path / "host"
    home.mkdir()
    with tarfile.open(home / "bucket.tar.gz", "w:gz") as archive:
        archive.add(Path(tpu.__file__).with_name("supervise.sh"), "launch/supervise.sh")
    (home / "uv").write_text(UV)
    record = f'echo "$(basename $0) $* $([[ $* == *" - "* ]] && cat)" >>"{home}/calls"\n'
    for name, text in {
        "gcloud": f'case "$*" in *code.tar.gz*) cp "{home}/bucket.tar.gz" code.tar.gz;; esac\n',
        "curl": f'case "$*" in *agent-worker-number*) echo $WORKER;; *uv/install.sh*) cat "{home}/uv";; esac\n',
    }.items():
        (fakes.folder / "bin" / name).write_text("#!/bin/bash\n" + record + text)
    (tmp_path / "startup.sh").write_text(script)
    started = []

    def boot(training, worker="0", preparing=""):
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "SEAL_HOME": str(home / "seal"), "WORKER": worker,
            "TRAINING": training, "PREPARING": preparing, "RESTART_DELAY": "0", "MAX_FAILURES": "2",
        }  # fmt: skip
        # A group of its own, as a machine that goes down signals all processes.
        started.append(
            subprocess.Popen(
                ["bash", tmp_path / "startup.sh"], env=environment, start_new_session=True
            )
        )
        return started[-1]

    def outcome():
        """Return the exit code that is in the bucket, or None, and whether the machines were given back."""
        lines = (home / "calls").read_text().splitlines()
        states = [
            line.split()[-1]
            for line in lines
            if "storage cp - gs://bucket/runs/quick.launch/state" in line
        ]
        deleted = any("queued-resources delete seal --zone=z --force" in line for line in lines)
        assert any("storage cp run.log" in line for line in lines)
        return (states or [None])[-1], deleted

    yield boot, outcome, home / "seal"
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize(
    ("training", "worker", "code", "ended"),
    [
        ("exit 0", "0", 0, ("0", True)),
        ("exit 2", "0", 2, ("2", True)),
        ("exit 1", "0", 1, ("1", True)),  # after two tries
        ("exit 0", "1", 0, (None, False)),  # the first host speaks for all
    ],
)
def test_the_machines_are_given_back_at_the_end(host, training, worker, code, ended):
    boot, outcome, home = host
    assert boot(f'echo "$@" >>"{home}/words"; {training}', worker).wait(30) == code
    assert outcome() == ended
    tries = (home / "words").read_text().splitlines()
    assert len(tries) == (2 if code == 1 else 1)
    assert tries[0] == (
        "-m seal_jax train --config=configs/quickstart.py:seal --workdir=gs://bucket/runs/quick "
        "--config.train.seeds=2 --coordinator=auto"
    )


# The training: it says that it has begun, and saves on SIGTERM.
SAVES = 'trap "echo saved; exit 75" TERM; touch "{}/began"; while true; do sleep 0.05; done'


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)


def test_a_machine_that_is_taken_away_saves_and_is_not_given_back(host):
    boot, outcome, home = host
    process = boot(SAVES.format(home))
    wait_for(home / "began", process)
    os.killpg(process.pid, signal.SIGTERM)
    # With which code does not matter: all processes have been signalled, some of them twice.
    process.wait(30)
    assert outcome() == (None, False)
    assert "saved" in (home / "run.log").read_text()


@pytest.mark.parametrize("code", [75, 1])
def test_the_shutdown_script_waits_until_the_training_has_saved(host, launch, code):
    boot, outcome, home = host
    process = boot(
        SAVES.format(home).replace("echo saved; exit 75", f"sleep 0.5; echo saved; exit {code}")
    )
    wait_for(home / "began", process)
    script = Path(tpu.__file__).with_name("tpu_shutdown.sh")
    for _ in range(2):  # the second time there is nothing left to wait for
        subprocess.run([script], env={**os.environ, "SEAL_HOME": str(home)}, check=True, timeout=30)
        assert "saved" in (home / "run.log").read_text()
    assert process.wait(30) == code
    assert outcome() == (None, False)


def stop_command(launch, home):
    """Return the command that gcloud's ssh would give to the host."""
    code, line, _ = launch("tpu", "stop", "--zone=z", "--dry-run", "seal")
    assert code == 0
    (word,) = [word for word in shlex.split(line) if word.startswith("--command=")]
    return word.partition("=")[2].replace("/opt/seal_jax", str(home)).replace("sudo ", "")


def test_stop_saves_and_gives_the_machines_back(host, launch):
    boot, outcome, home = host
    process = boot(SAVES.format(home))
    wait_for(home / "began", process)
    subprocess.run(["bash", "-c", stop_command(launch, home)], check=True)
    assert process.wait(30) == 75
    assert outcome() == ("75", True)


def test_stop_before_the_training_has_begun(host, launch):
    boot, outcome, home = host
    home.mkdir()
    for leftover in ("stop", "pid"):
        (home / leftover).write_text("1")  # of an earlier boot
    preparing = f"ls {home} >{home}/before; {stop_command(launch, home)}"
    assert boot(SAVES.format(home), preparing=preparing).wait(30) == 75
    assert not {"stop", "pid"} & {*(home / "before").read_text().split()}
    assert not (home / "began").exists()
    assert outcome() == ("75", True)


def test_watch_asks_again_after_a_preemption(launch, fakes, monkeypatch):
    monkeypatch.setattr(tpu, "_POLL_SECONDS", 0.0)
    states = ["WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE", "ACTIVE"]
    fakes.rules(
        ("describe", 1, "ERROR: NOT_FOUND"),  # there is none of this name yet
        *(("describe", 0, state) for state in states),
        ("describe", 0, "ACTIVE"),
        *(("storage cat", 0, "running") for _ in range(len(states) + 1)),
        ("storage cat", 0, "0"),
        ("storage cat", 0, "0"),
    )
    code, output, _ = launch(*RUN, BUCKET)
    assert code == 0
    assert "seal ended with exit code 0" in output
    lines = [" ".join(call["words"]) for call in fakes.calls()]
    done = [line.split()[4] for line in lines if "create seal" in line or "delete seal" in line]
    assert done == ["create", "delete", "create", "delete"]


def test_watch_does_not_ask_again_for_what_a_person_has_deleted(launch, fakes, monkeypatch):
    monkeypatch.setattr(tpu, "_POLL_SECONDS", 0.0)
    fakes.rules(
        ("describe", 0, "ACTIVE"),
        ("describe", 0, "ACTIVE"),
        ("describe", 1, "ERROR: NOT_FOUND"),
        ("storage cat", 0, "running"),
    )
    code, output, _ = launch(*RUN, BUCKET)
    assert code == 75
    assert "seal was deleted before its training ended: not asked for again" in output
    assert not any("create" in call["words"] for call in fakes.calls())


@pytest.mark.parametrize(("marker", "code"), [("2", 2), ("0", 0)])
def test_watch_ends_with_the_code_of_the_training(marker, code, launch, fakes):
    fakes.rules(("storage cat", 0, "1"), ("storage cat", 0, marker))
    assert launch(*RUN, BUCKET)[0] == code
    # It has given itself back.
    assert not any("delete" in call["words"] for call in fakes.calls())


def test_watch_goes_on_when_a_job_of_a_sweep_has_failed(launch, fakes, monkeypatch):
    monkeypatch.setattr(tpu, "_POLL_SECONDS", 0.0)
    gone = ("describe seal-seal", 1, "ERROR: NOT_FOUND")
    fakes.rules(
        ("describe seal-normal", 0, "FAILED"),
        # It ends, and gives itself back, between the look and the watch's own delete.
        ("describe seal-llf", 0, "ACTIVE"),
        ("delete seal-llf", 1, "ERROR: NOT_FOUND"),
        *(("quick/llf.launch", 0, marker) for marker in ("running", "0", "0")),
        *[("describe seal-seal", 0, "SUSPENDED")] * 2, gone, gone, gone,
        ("create seal-seal", 1, "ERROR: 503"),
        ("create seal-seal", 1, "ERROR: quota"),
        ("create seal-seal", 0, ""),
        *[("quick/seal.launch", 0, "running")] * 4,
        *[("quick/seal.launch", 0, "0")] * 2,
        ("storage cat", 0, "running"),
    )  # fmt: skip
    code, output, error = launch(*SWEEP, BUCKET)
    assert (code, error) == (1, "")
    lines = output.splitlines()
    assert sum("the request seal-normal has failed" in line for line in lines) == 1
    assert "seal-llf ended with exit code 0" in output
    failed = [line for line in lines if line.startswith("error")]
    assert ["503" in line or "quota" in line for line in failed] == [True, True]
    assert "seal-seal ended with exit code 0" in output
    calls = [" ".join(call["words"]) for call in fakes.calls()]
    assert sum("create" in line for line in calls) == 3


def test_watch_can_be_taken_up_again(launch, fakes):
    fakes.rules(("describe", 0, "ACTIVE"), ("storage cat", 0, "0"))
    assert launch(*RUN, BUCKET)[0] == 0
    calls = [call["words"] for call in fakes.calls()]
    assert not any("create" in words for words in calls)
    # The training has ended, but its machines are still there.
    assert any("delete" in words for words in calls)
    # And when they are not, none are asked for.
    fakes.rules(("storage cat", 0, "0"))
    code, output, _ = launch(*RUN, BUCKET)
    assert (code, "# seal is done" in output) == (0, True)
    assert not {"create", "delete"} & {word for call in fakes.calls() for word in call["words"]}
