"""What each target creates, by the calls that stand-ins of its tools record; and what is left when they fail."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import chips, command, slurm, yaml
from launch.shell import Shell

yaml_reader = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
EVIL = '--config.data.data_dir=a\'b "$(touch evil)" [:10%] `c`'
TRAIN = ("--", "train", "--config=configs/quickstart.py:seal", "--config.train.seeds=8", EVIL)
SWEEP = ("--", "sweep", "--config=configs/quickstart.py", "--config.train.seeds=8")
BUCKET = "--workdir=gs://bucket/runs/quick"
RUNS = {
    "tpu": ("tpu", "run", "--zone=us-west4-a", "--project=p"),
    "gke": ("gke", "run", "--image=registry/seal:1", "--context=c"),
    "slurm": ("slurm", "run", "--gpus=4"),
    "sky": ("sky", "run", "--accelerators=H100:8"),
}


def workdir(target, tmp_path):
    return f"--workdir={tmp_path / 'runs' / 'quick'}" if target == "slurm" else BUCKET


def shell_words(script):
    """Return the words of the array of that name in a script, as bash reads them."""
    (line,) = re.findall(r"^(?:0\) )?(words=\(.*\))(?: ;;)?$", script, re.M)
    done = subprocess.run(
        ["bash", "-c", line + '; printf "%s\\0" "${words[@]}"'], capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("target", RUNS)
@pytest.mark.parametrize("what", [TRAIN, SWEEP])
def test_a_dry_run_prints_what_a_run_does(target, what, launch, fakes, tmp_path):
    words = (*RUNS[target], *what, workdir(target, tmp_path))
    code, script, error = launch(*words[:2], "--dry-run", *words[2:])
    assert (code, error, fakes.calls()) == (0, "", [])
    assert not (tmp_path / "runs").exists()
    # The printed text, run by a shell, makes the calls of the real run.
    subprocess.run(["bash", "-euc", script], check=True, stdin=subprocess.DEVNULL)
    printed = fakes.calls()
    assert launch(*words)[0] == 0
    # What a run only looks at is not printed.
    done = [call for call in fakes.calls() if not {"describe", "get"} & {*call["words"]}]
    assert len(done) >= 1
    assert temporary(printed) == temporary(done)
    assert not list(tmp_path.glob("**/evil"))


def temporary(calls):
    """Return calls without the random names of temporary files."""
    return re.sub(r"/tmp\w{8}\.", "/tmp.", str(calls))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--node-id=seal", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]),
        (["--topology=v6e:2x4", "--tier=on-demand"], ["--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]),
        (["--topology=v5p:2x2x2", "--tier=reserved"], ["--accelerator-type=v5p-16", "--reserved"]),
        (
            ["--topology=v5e:2x2", "--slices=2", "--extra=--network=n --labels=a=b"],
            ["--node-count=2", "--node-prefix=seal", "--network=n", "--labels=a=b"],
        ),
        (
            ["--tier=flex-start", "--duration=12h"],
            ["gcloud alpha compute", "--provisioning-model=flex-start", "--max-run-duration=12h"],
        ),
    ],
)  # fmt: skip
def test_tpu(options, expected, launch, fakes):
    fakes.rules(("git rev-parse", 0, "abc123"))
    code, output, _ = launch(*RUNS["tpu"], *options, *TRAIN, BUCKET)
    assert code == 0
    calls = fakes.calls()
    lines = [" ".join(call["words"]) for call in calls]
    assert lines[1] == "git cat-file -e abc123:./configs/quickstart.py"
    assert "describe seal" in lines[3]
    assert lines[4].endswith(" abc123")
    assert lines[5].endswith("gs://bucket/runs/quick.launch/code.tar.gz")
    assert (lines[6], calls[6]["stdin"]) == (
        "gcloud storage cp - gs://bucket/runs/quick.launch/state",
        "running\n",
    )
    assert len(calls) == 8
    create = lines[7]
    assert "queued-resources create seal --zone=us-west4-a --project=p" in create
    assert (
        f"--metadata-from-file=shutdown-script={ROOT}/launch/tpu_shutdown.sh,startup-script="
        in create
    )
    for words in expected:
        assert words in create
    assert ("--spot" in create) == ("--spot" in expected or "--slices=2" in options)
    (script,) = calls[7]["files"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert shell_words(script) == [*TRAIN[1:], BUCKET, "--coordinator=auto"]
    assert "python -m launch tpu logs seal --zone=us-west4-a --project=p" in output


def test_gke(launch, fakes):
    options = (
        "--topology=v5e:4x4",
        "--slices=2",
        "--queue=multislice-queue",
        "--data=gs://bucket/tfds/d",
    )
    assert launch(*RUNS["gke"], *options, *TRAIN, BUCKET, "--config.train.batch_size=32")[0] == 0
    _, call = fakes.calls()
    assert call["words"][:4] == ["kubectl", "--context=c", "create", "--output=name"]
    jobset = yaml_reader.safe_load(call["stdin"])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "seal"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    # With podFailurePolicy Kubernetes asks for restartPolicy Never; with 0 any failure fails the slice.
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["hostNetwork"] is True
    # What supervise.sh in the image ends with when it gives up is what the policy does not repeat.
    assert {"name": "GIVE_UP_CODE", "value": "2"} in pod["containers"][0]["env"]
    (container,) = pod["containers"]
    assert container["args"] == [
        *TRAIN[1:],
        BUCKET,
        "--config.train.batch_size=32",
        "--coordinator=auto",
    ]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert policy["maxRestarts"] == 50
    (copy,) = pod["initContainers"]
    assert copy["command"][-2:] == ["gs://bucket/tfds/d", "/data"]
    assert {entry["name"]: entry["value"] for entry in container["env"]}["TFDS_DATA_DIR"] == "/data"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_gke_with_an_account_of_its_own(launch, fakes):
    """Workload Identity does not reach pods on the network of the host."""
    assert launch(*RUNS["gke"], "--service-account=trainer", *TRAIN, BUCKET)[0] == 0
    jobset = yaml_reader.safe_load(fakes.calls()[-1]["stdin"])
    (slices,) = jobset["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"
    assert not {"hostNetwork", "dnsPolicy"} & {*pod}


def test_a_sweep_is_a_job_for_each_variant(launch, fakes):
    code, output, _ = launch(*RUNS["gke"], *SWEEP, BUCKET)
    assert code == 0
    _, call = fakes.calls()
    jobsets = list(yaml_reader.safe_load_all(call["stdin"]))
    assert [jobset["metadata"]["name"] for jobset in jobsets] == [
        "seal-normal",
        "seal-llf",
        "seal-seal",
    ]
    args = [
        jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][
            0
        ]["args"]
        for jobset in jobsets
    ]
    assert args[1] == [
        "train", "--config=configs/quickstart.py:llf", "--workdir=gs://bucket/runs/quick/llf",
        "--config.train.seeds=8",
    ]  # fmt: skip
    root = "gs://bucket/runs/quick"
    folders = " ".join(f"{root}/{variant}" for variant in ("normal", "llf", "seal"))
    assert f"python -m seal_jax compare {folders} --output={root}" in output
    _, output, _ = launch(*RUNS["gke"], "--dry-run", *SWEEP, "--workdir=gs://bucket/a b")
    assert "compare 'gs://bucket/a b/normal'" in output
    assert launch(*RUNS["gke"], "--one-job", *SWEEP, BUCKET)[0] == 0
    _, call = fakes.calls()
    assert '"sweep"' in call["stdin"]


@pytest.mark.parametrize(
    ("code", "restarts", "expected", "requeued", "short"),
    [
        (0, 0, 0, False, -1), (2, 0, 2, False, -1), (75, 3, 0, True, 600), (75, 100, 75, False, 600),
        (1, 99, 0, True, -1), (1, 100, 1, False, -1), (1, 0, 1, False, 600), (137, 0, 0, True, 600),
    ],
)  # fmt: skip
def test_slurm(code, restarts, expected, requeued, short, launch, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "_SHORT_SECONDS", short)
    code_, output, _ = launch(
        *RUNS["slurm"], "--extra=--partition=gpu", *SWEEP, workdir("slurm", tmp_path)
    )
    assert code_ == 0
    (call,) = fakes.calls()
    assert call["words"] == ["sbatch", "--parsable", "--partition=gpu"]
    script = call["stdin"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.M))
    assert options["array"] == "0-2"
    # Slurm gives each task a process, and JAX each process the GPU of its number.
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert (tmp_path / "runs" / "quick.launch").is_dir()
    assert options["output"] == f"{tmp_path}/runs/quick.launch/seal-%a.log"
    assert "python -m launch slurm stop seal\n" in output
    # The script itself, run with a stand-in for srun.
    fakes.rules(("srun", code, "trained"))
    environment = {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    batch = tmp_path / "batch"
    batch.write_text(script)
    done = subprocess.run(["bash", batch], capture_output=True, check=False)
    assert done.returncode == expected
    srun, *others = [call["words"] for call in fakes.calls()]
    assert srun[2:5] == ["-m", "seal_jax", "train"]
    assert srun[5:] == [
        "--config=configs/quickstart.py:llf", f"--workdir={tmp_path}/runs/quick/llf",
        "--config.train.seeds=8", "--coordinator=auto",
    ]  # fmt: skip
    assert others == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_words_reach_the_training_as_they_are(launch, fakes, tmp_path):
    folder = workdir("slurm", tmp_path)
    assert launch("slurm", "run", *TRAIN, folder)[0] == 0
    (call,) = fakes.calls()
    assert shell_words(call["stdin"]) == [*TRAIN[1:], folder]
    assert "--array" not in call["stdin"]


@pytest.mark.parametrize("folder", [("--workdir=runs/quick",), ("--workdir", "runs/quick")])
def test_slurm_takes_a_relative_folder_from_the_clone(folder, launch, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "ROOT", tmp_path / "clone")
    assert launch("slurm", "run", *TRAIN[:3], *folder, TRAIN[3])[0] == 0
    (call,) = fakes.calls()
    absolute = f"--workdir={tmp_path}/clone/runs/quick"
    assert shell_words(call["stdin"]) == [*TRAIN[1:3], absolute, TRAIN[3]]
    assert f"--output={tmp_path}/clone/runs/quick.launch/seal.log" in call["stdin"]


def test_sky(launch, fakes):
    options = ("--nodes=2", "--data=gs://bucket/tfds/d", "--infra=gcp/us-central1")
    assert launch(*RUNS["sky"], *options, *TRAIN, BUCKET, "--config.train.batch_size=32")[0] == 0
    (call,) = fakes.calls()
    assert call["words"][:5] == ["sky", "jobs", "launch", "--yes", "--detach-run"]
    task = yaml_reader.safe_load(call["files"][0])
    assert task["resources"] == {
        "accelerators": "H100:8",
        "use_spot": True,
        "infra": "gcp/us-central1",
    }
    assert (task["num_nodes"], task["workdir"]) == (2, ".")
    assert task["file_mounts"] == {"/tmp/tfds/d": "gs://bucket/tfds/d"}
    assert task["envs"] == {"TFDS_DATA_DIR": "/tmp/tfds"}
    # What runs on a node, with echo in the place of the training.
    line = task["run"].replace("exec launch/supervise.sh", 'exec printf "%s\\0"')
    environment = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", line], env={"HOME": "/h", **environment}, capture_output=True, check=True
    )
    words = done.stdout.decode().split("\0")[:-1]
    assert words[:3] == ["/h/seal_venv/bin/python", "-m", "seal_jax"]
    assert words[3:] == [
        *TRAIN[1:], BUCKET, "--config.train.batch_size=32", "--coordinator=10.0.0.1:9911",
        "--processes=2", "--process=1",
    ]  # fmt: skip
    assert (
        subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    )


@pytest.mark.parametrize(
    ("target", "rule", "code", "message", "undone"),
    [
        ("tpu", ("create seal-seal", 5, "Progress...\nERROR: quota"), 5, "ERROR: quota; see the quota",
         ["seal-normal", "seal-llf", "seal-seal"]),
        ("tpu", ("create seal-seal", 1, "ERROR: ALREADY_EXISTS"), 1, "ALREADY_EXISTS; see the quota",
         ["seal-normal", "seal-llf"]),
        ("tpu", ("describe seal-seal", 0, "ACTIVE"), 2, "the request seal-seal exists (ACTIVE): --watch takes", []),
        ("tpu", ("describe seal-seal", 1, "ERROR: 503"), 1, "ERROR: 503; see --zone", []),
        ("tpu", ("llf.launch/code", 1, "ERROR: 403"), 1, "ERROR: 403; can you write to the bucket", ["seal-normal"]),
        ("tpu", ("git rev-parse", 128, "fatal: no commit"), 128, "fatal: no commit; give a commit with --ref", []),
        ("tpu", ("cat-file", 128, "fatal: path"), 128, "fatal: path; commit the config, or give another", []),
        ("gke", ("create", 1, "error: no kind JobSet"), 1, "error: no kind JobSet; see --context",
         ["seal-normal seal-llf seal-seal"]),
        ("gke", ("get", 0, "jobset.jobset.x-k8s.io/seal-llf"), 2, "seal-llf: exists, for 12 hours", []),
        ("slurm", ("sbatch", 1, "sbatch: error: invalid partition"), 1, 'invalid partition; see its partition', []),
        ("sky", ("detach-run --name=seal-llf", 1, "no cloud"), 1, "no cloud; `sky check`", ["seal-normal", "seal-llf"]),
    ],
)  # fmt: skip
def test_a_tool_that_fails(target, rule, code, message, undone, launch, fakes, tmp_path):
    """One line with the fix, the tool's exit code, and nothing left of a sweep."""
    fakes.rules(rule)
    got, _, error = launch(*RUNS[target], *SWEEP, workdir(target, tmp_path))
    assert (got, error.count("\n")) == (code, 1)
    assert message in error
    lines = [" ".join(call["words"]) for call in fakes.calls()]
    taken_back = [line for line in lines if " delete " in line or " cancel " in line]
    assert len(taken_back) == len(undone)
    if not undone:
        assert not any(" storage cp " in line for line in lines)
    for name, line in zip(undone, taken_back, strict=True):
        assert re.search(rf"\b{name}\b", line)


@pytest.mark.parametrize(
    ("target", "create"), [("tpu", "create"), ("gke", "create"), ("sky", "launch")]
)
def test_an_interrupt_while_a_job_is_created(target, create, launch, fakes, monkeypatch):
    call = Shell._call

    def interrupted(self, words, **options):
        done = call(self, words, **options)
        if create in words:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Shell, "_call", interrupted)
    assert launch(*RUNS[target], *TRAIN, BUCKET)[0] == 130
    last = " ".join(fakes.calls()[-1]["words"])
    assert re.search(r" (delete|cancel) .*\bseal\b", last)


def test_kubectl_that_fails_in_the_middle(launch, fakes):
    # kubectl prints what it has created before it fails.
    tool = fakes.folder / "bin" / "kubectl"
    tool.write_text(
        '#!/bin/sh\necho "$@" >>"$FAKES/kubectl"\ncase "$*" in *create*) echo jobset.jobset.x-k8s.io/seal-normal\n'
        "echo 'Error from server (AlreadyExists): seal-llf' >&2; exit 1;; esac\n"
    )
    code, _, error = launch(*RUNS["gke"], *SWEEP, BUCKET)
    assert (code, error.count("\n")) == (1, 1)
    assert "AlreadyExists" in error
    calls = (fakes.folder / "kubectl").read_text().splitlines()
    assert calls[2:] == [
        "--context=c delete jobsets seal-normal seal-llf seal-seal --ignore-not-found"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*RUNS["tpu"], *TRAIN, "--workdir=runs/a"), "must be in a bucket"),
        ((*RUNS["gke"], *TRAIN, "--workdir=gs://bucket"), "must be in a bucket"),
        ((*RUNS["tpu"], *SWEEP, "--workdir=gs://bucket"), "must be in a bucket"),
        ((*RUNS["gke"], *SWEEP, "--workdir=gs://bucket/"), "must be in a bucket"),
        ((*RUNS["sky"], *TRAIN, "--workdir=runs/a"), "must be in a bucket"),
        ((*RUNS["sky"], *TRAIN, "--workdir=s3://bucket/a"), "must be in a bucket, gs://"),
        ((*RUNS["tpu"], *TRAIN, BUCKET, "--config.data.data_dir=/data"), "data.data_dir = '/data' is not on"),
        ((*RUNS["sky"], *TRAIN, BUCKET, "--config.train.pretrained=/a"), "train.pretrained = '/a' is not on"),
        ((*RUNS["tpu"], *TRAIN, BUCKET, "--config.run.loggers=csv,wandb"), "have tensorboard and csv only"),
        ((*RUNS["slurm"], *TRAIN, BUCKET), "a folder that the nodes share"),
        ((*RUNS["tpu"], "--tier=flex-start", *TRAIN, BUCKET), "--duration=TIME go together"),
        ((*RUNS["tpu"], "--topology=v5e:8", *TRAIN, BUCKET), "must be KIND:SHAPE"),
        ((*RUNS["tpu"], "--topology=v5p:2x4", *TRAIN, BUCKET), "shapes of 3 dimensions"),
        ((*RUNS["tpu"], "--data=tfds", *TRAIN, BUCKET), "--data=tfds must be a folder in a bucket"),
        ((*RUNS["tpu"], "--name=Seal_1", *TRAIN, BUCKET), "'Seal_1' is no name"),
        ((*RUNS["gke"], "--topology=v5e:4x4", *SWEEP, BUCKET, "--config.train.batch_size=9"), "on 16 devices"),
        ((*RUNS["sky"], *TRAIN, BUCKET, "--config.train.seads=1"), "train.seads is not a setting"),
        ((*RUNS["sky"], *TRAIN, BUCKET, "--config.run.loggers=x"), "run.loggers = 'x'"),
        ((*RUNS["sky"], *TRAIN, BUCKET, "--process=1"), "are given by the launcher"),
        ((*RUNS["sky"], "--", "sweep", "--config=configs/results.py", BUCKET), "add --one-job"),
        ((*RUNS["sky"], "--", "train", "--config=/a.py", BUCKET), "a path within the clone"),
        ((*RUNS["sky"], "--extra=--foo='", *TRAIN, BUCKET), "is no part of a command: No closing quotation"),
        ((*RUNS["slurm"], "--notice=29", *TRAIN, "--workdir=runs/a"), "--notice=29 must be at least 30"),
        (RUNS["sky"], "after -- comes what is launched"),
        (("tpu", "stop", "--zone=z", "a b"), "'a b' is no name"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_anything_is_created(words, message, launch, fakes):
    code, _, error = launch(*words)
    assert (code, error.count("\n"), fakes.calls()) == (2, 1, [])
    assert message in error


def test_a_tool_that_is_missing(launch, fakes, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, error = launch(*RUNS["sky"], *TRAIN, BUCKET)
    assert (code, error) == (2, 'error: sky is not installed; pip install "skypilot[gcp]"\n')


@pytest.mark.parametrize("target", RUNS)
def test_the_other_actions_keep_the_exit_code(target, launch, fakes):
    place = ["--zone=z"] if target == "tpu" else []
    for action in command._TARGETS[target].ACTIONS:
        fakes.rules(("seal", 7, "gone"), ("queue", 7, "gone"))
        assert launch(target, action, *place, "seal")[0] == 7
        assert len(fakes.calls()) == 1
        assert launch(target, action, "--dry-run", *place, "seal")[0] == 0
        assert fakes.calls() == []


@pytest.mark.parametrize(
    "text",
    ["no", "a: b # c", 'it\'s "so"', "tab\tend ", "- x", "", "*a", "123", "a\nb: |\n\n  c", "é %"],
)
def test_yaml_is_read_as_it_was_written(text):
    value = {
        "a": text,
        "list": [text, 1, {"b": text, "c": {"d": True}}],
        "none": [],
        "e": {text or "k": None},
    }
    assert yaml_reader.safe_load(yaml.dump(value)) == value


def test_slices_have_the_hosts_that_google_says():
    # https://cloud.google.com/tpu/docs: hosts of 8 chips up to v5e and v6e 2x4, else of 4.
    hosts = {"v5e:1x1": 1, "v5e:2x2": 1, "v5e:2x4": 1, "v5e:4x4": 4, "v5e:16x16": 64, "v6e:4x8": 8,
             "v4:2x2x1": 1, "v5p:2x2x4": 4}  # fmt: skip
    assert {name: chips.parse(name).hosts for name in hosts} == hosts


def documented():
    for path in (ROOT / "launch" / "README.md", ROOT / "docs" / "tpu.md"):
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        for line in re.findall(r"^ +python -m launch ([^#\n]*)", text, re.M):
            yield line.strip()


@pytest.mark.parametrize("line", [*documented()])
def test_documented_commands_run(line, launch, tmp_path):
    first, *words = shlex.split(
        line.replace("/shared/", f"{tmp_path}/").replace("ZONE", "us-west4-a")
    )
    assert launch(first, words[0], "--dry-run", *words[1:])[0] == 0
