"""What a user can get wrong gives one line, exit code 2, and leaves no trace."""

import errno
import json
import os
import shlex
import socket
import subprocess
import sys

import pytest

from seal_jax.cli import configs, main
from seal_jax.core.settings import Run, Settings
from seal_jax.errors import BucketError, UsageError
from seal_jax.training import loggers
from seal_jax.training import workdir as workdirs
from seal_jax.training.metrics import MetricsLog

CONFIG = """\
from seal_jax.cli.configs import base

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    config.data.data_dir = {data_dir!r}
    config.data.validation_fraction = 0.9
    config.model.name = "resnet8"
    config.model.width = 4
    config.train.generations = 3
    config.train.epochs_per_generation = 4
    return config
"""

BASE = "from seal_jax.cli.configs import base\ndef get_config():\n    config = base()\n"

PLAIN = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict"


@pytest.fixture
def config(tmp_path, digits_dir):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(data_dir=str(digits_dir)))
    return path


@pytest.fixture
def run(capfd):
    """Run a command that must fail; return the words of its one line on stderr."""

    def run(*arguments):
        assert main.run([str(argument) for argument in arguments]) == main.USAGE
        captured = capfd.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert captured.err.endswith("\n")
        assert captured.out == ""
        return captured.err

    return run


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("train.seads=1", "train.seads is not a setting; nearest: seeds, seed"),
        ("trian.seeds=1", "trian.seeds is not a setting; nearest: train"),
        ("method.reset_norm=true", "method.reset_norm is not a setting"),
        ("train.seeds=two", "train.seeds = 'two' must be of type int"),
        ("train.seeds=1.5", "train.seeds = '1.5' must be of type int"),
        ("train.drop_last=maybe", "train.drop_last = 'maybe' must be true or false"),
        ("train=1", "train is a section"),
        ("train.dtype=float16", "train.dtype = 'float16' must be one of float32, bfloat16"),
        ("train.seeds=0", "train.seeds = 0 must be at least 1"),
        ("train.generations=0", "train.generations = 0 must be at least 1"),
        ("train.seed=4294967295 train.seeds=2", "train.seed = 4294967295"),
        ("train.batch_size=1000", "train.batch_size = 1000 must lie in 1.."),
        ("train.batch_size=33", "train.batch_size = 33 is no multiple of the 8 devices"),
        ("run.seed_devices=3", "run.seed_devices = 3"),
        ("run.steps_per_call=3", "run.steps_per_call = 3 does not divide the 4 steps"),
        ("method.threshold=layer9", "method.threshold: layer threshold 'layer9' is not in"),
        ("method.threshold=conv1", "method.threshold: layer threshold 'conv1' is the first"),
        ("method.ascent_epochs=0.3", "ascent_epochs = 0.3 is 1.2 steps of 4 per epoch"),
        ("method.ascent_epochs=5", "ascent_epochs = 5 must lie between 0 and epochs_per"),
        ("method.ascent_scale=-1", "ascent_scale = -1"),
        ("optimizer.schedule=single", 'optimizer.schedule = "single" does not go with method'),
        ("optimizer.learning_rate=nan", "learning_rate = nan must be positive and finite"),
        ("optimizer.label_smoothing=1", "optimizer.label_smoothing = 1 must lie in [0, 1)"),
        ("optimizer.warmup_epochs=9", "warmup_epochs = 9"),
        ("model.name=resnet9", "'resnet9' is unknown; nearest: resnet8"),
        ("model.width=0", "width = 0 must be a whole number of at least 1"),
        ("model.stem=cifar", "resnet8 has no such option"),
        (
            "data.name=dijits",
            "data.name='dijits' is not a data set that TFDS knows; nearest: digits",
        ),
        ("data.label=coarse_label", "data.label='coarse_label' is not one of label"),
        ("data.image_size=2", "image_shape=(2, 2, 1) is too small for resnet8"),
        ("data.crop_padding=9", "data.crop_padding=9"),
        (f"train.epochs_per_generation={10**12}", f"= {10**12} must be at most 715827882, with"),
        # 143 training images, so 4 steps an epoch.
        (f"train.epochs_per_generation={2 * 10**8}", "must be at most 178956970, with"),
        (
            f"train.generations={10**20}",
            "train.generations = 100000000000000000000 must be at most",
        ),
        ("data.train_split=train[5:2]", "train_split='train[5:2]' has no example"),
        ("data.image_size=1000000", "data.image_size: 1 images of 1000000x1000000x1"),
        ("data.data_dir=/proc/none", "data.data_dir=/proc/none does not exist: make it"),
        ("optimizer.decay_epochs=x,y", "optimizer.decay_epochs = 'x,y' must be epochs"),
        ("data.normalisation=mnist", "data.normalisation='mnist' is not one of"),
        ("data.validation_fraction=1", "data.validation_fraction=1.0 must lie in [0, 1)"),
        ("data.validation_fraction=0.9999", "leaves class 0"),
    ],
)
def test_settings(run, config, tmp_path, overrides, says):
    overrides = [f"--config.{override}" for override in overrides.split()]
    assert says in run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides)
    assert os.listdir(tmp_path) == ["tiny.py"]


def test_missing_data_say_how_to_prepare_them(run, config, tmp_path):
    empty = tmp_path / "empty"
    overrides = ["--config.data.name=fashion_mnist", f"--config.data.data_dir={empty}"]
    line = run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides)
    command = f"python -m seal_jax prepare --dataset=fashion_mnist --data-dir={empty}"
    assert f"run `{command}`" in line
    assert os.listdir(tmp_path) == ["tiny.py"]
    main.parser().parse_args(shlex.split(command)[3:])  # such a command exists


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", ", line 1: invalid syntax"),
        ("x = 1\n", " has no function get_config"),
        ("raise RuntimeError('a\\nb')\n", ", line 1: RuntimeError: a b"),
        ("def get_config():\n    raise KeyError('a')\n", ", line 2: KeyError: 'a'"),
        ("def get_config():\n    return 3\n", ": get_config must return a ConfigDict"),
        ("def get_config(variant):\n    pass\n", ": TypeError: get_config() missing"),
        ("import not_there\n", "not_there is not installed"),
        (
            "from seal_jax.cli.configs import base\ndef get_config():\n    return base('sael')\n",
            ", line 3: method.name = 'sael' is not a method; nearest: seal",
        ),
        (f"{BASE}    config.method = None\n    return config\n", "method = None must be a section"),
        (f"{PLAIN}({{'method': 'seal'}})\n", "method = 'seal' must be a section"),
        (f"{PLAIN}({{'method': {{'name': ['seal']}}}})\n", "method.name"),
        (f"{PLAIN}({{'method': {{}}}})\n", "method.name must name the method"),
        (f"VARIANTS = 3\n{BASE}    return config\n", "VARIANTS = 3 must be a tuple of names"),
        (f"{BASE}    config.train.seads = 2\n    return config\n", "train.seads is not a setting"),
    ],
)
def test_config_files(run, tmp_path, text, says):
    path = tmp_path / "config.py"
    path.write_text(text)
    assert says in run("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_command_lines(run, config, tmp_path):
    train = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert "required: COMMAND" in run()
    assert "invalid choice: 'trian'" in run("trian")
    assert "required: --config" in run("train", f"--workdir={tmp_path}")
    assert "required: --workdir" in run("train", f"--config={config}")
    assert "--bogus is not an option of train" in run(*train, "--bogus")
    assert "extra is not an option of train" in run(*train, "extra")
    assert "--config.train.seeds is not an option" in run(*train, "--config.train.seeds")
    assert "not a Python file" in run("train", "--config=none.py", f"--workdir={tmp_path / 'run'}")
    variant = run("train", f"--config={config}:sael", f"--workdir={tmp_path / 'run'}")
    assert "must be one of normal, llf, seal; nearest: seal" in variant
    assert "required: --dataset" in run("prepare")
    assert "required: DIR" in run("compare")
    assert os.listdir(tmp_path) == ["tiny.py"]


def test_several_processes(run, config, tmp_path):
    train = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert "need --coordinator=HOST:PORT" in run(*train, "--processes=2")
    assert "needs --processes=N" in run(*train, "--coordinator=127.0.0.1:9")
    two = [*train, "--processes=2"]
    assert "must be HOST:PORT" in run(*two, "--process=0", "--coordinator=here")
    assert "--process=2 must lie in 0..1" in run(*two, "--process=2", "--coordinator=a:9")
    for address in ("127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1", ":9"):
        line = run(*two, "--process=0", f"--coordinator={address}")
        assert f"--coordinator={address} must be HOST:PORT, with a port in 1..65535" in line
    assert "--coordinator=auto: the cluster of this machine" in run(*train, "--coordinator=auto")


@pytest.mark.parametrize(("process", "whom"), [(0, "the other 1 processes"), (1, "process 0")])
def test_a_wait_for_other_processes_ends(config, tmp_path, process, whom):
    code = (
        "import sys\nfrom seal_jax.cli import main, processes\n"
        "processes.WAIT_SECONDS = 1\nsys.exit(main.run(sys.argv[1:]))"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--processes=2"]
    arguments += [f"--process={process}", f"--coordinator={coordinator}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    # Not bad input: what starts it again must go on doing so.
    assert done.returncode == main.CRASHED
    line = f"error: --coordinator={coordinator}: waited 1 s for {whom} in vain; start all,"
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_bucket_out_of_reach_is_worth_another_start(capsys):
    for number, code in ((errno.EACCES, main.USAGE), (errno.EIO, main.CRASHED)):

        def command(number=number):
            raise BucketError(number, "no answer", "gs://bucket/run")

        assert main.exit_code(command) == code
        assert capsys.readouterr().err == "error: gs://bucket/run: no answer\n"


def test_folders_of_data(run, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for name in ("file", "none"):
        line = run("datasets", f"--data-dir={tmp_path / name}")
        assert f"--data-dir={tmp_path / name} is not a folder" in line
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    info = {"splits": [{"name": "train", "shardLengths": ["3"]}], "fileFormat": "array_record"}
    for text in ("[" * 100_000, "3", '{"splits": "x"}', '{"splits": [3]}', json.dumps(info)):
        (folder / "dataset_info.json").write_text(text)
        (folder / "features.json").write_text('{"featuresDict": {"features": [1]}}')
        assert main.run(["datasets", f"--data-dir={tmp_path}"]) == main.OK
        table = capfd.readouterr().out
        assert [
            line.split()[-1] for line in table.splitlines() if line.startswith("CIFAR-10 ")
        ] == ["no"]
    (folder / "dataset_info.json").write_text("[" * 100_000)
    line = run("train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}",
        "--config.data.name=cifar10", f"--config.data.data_dir={tmp_path}")  # fmt: skip
    assert f"data.name='cifar10' in data_dir={tmp_path}" in line


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_folders_that_cannot_become_a_run(run, config, tmp_path):
    def train(workdir, *overrides):
        before = files(tmp_path)
        line = run("train", f"--config={config}", f"--workdir={workdir}", *overrides)
        assert files(tmp_path) == before
        return line

    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in train(file)
    assert "cannot be written" in train(file / "below")
    assert "cannot be written" in train("/proc/run")  # in which not even root can make a folder
    assert "has one of the characters * ? [" in train(tmp_path / "run[1]")
    assert "cannot be opened: give a folder or a gs:// URL" in train("s3://bucket/run")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    assert "is not empty and holds no run" in train(foreign)
    other = tmp_path / "other"
    workdirs.claim(other, configs.load(str(config), ["--config.train.generations=5"]))
    line = train(other, "--config.train.batch_size=16")
    assert "holds a run with other settings" in line
    assert "train.generations: 5 -> 3; train.batch_size: 32 -> 16" in line
    record = json.loads((other / "config.json").read_text())
    record["method"] = {"name": "kels", "rate": 0.8}
    (other / "config.json").write_text(json.dumps(record))
    assert "method.rate is not a setting, it is now method.fraction in wels" in train(other)
    for text in ("", "{", "[]", "3", json.dumps({"name": "package"}), '{"train": 3}'):
        (other / "config.json").write_text(text)
        assert str(other / "config.json") in train(other)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", ".metrics.jsonl.partial", "tensorboard", "metrics.csv"]
)
def test_parts_of_a_run_of_the_wrong_kind(config, tmp_path, name):
    folder = tmp_path / "run"
    workdirs.claim(folder, configs.load(str(config)))
    (folder / name).touch() if name == "tensorboard" else (folder / name).mkdir()

    def open_log():
        with MetricsLog(folder, resume_step=-1):
            loggers.start(folder, Settings(run=Run(loggers="csv,tensorboard")))

    with pytest.raises(UsageError, match=f"{name} is not a (file|folder): move it away"):
        open_log()


def test_folders_that_hold_no_run_to_compare(run, tmp_path):
    assert "holds no run" in run("compare", tmp_path / "none", "--output", tmp_path)
    assert "holds no run" in run("compare", tmp_path, "--output", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in run("compare", tmp_path, "--output", tmp_path / "table")
    assert os.listdir(tmp_path) == ["config.json"]


def test_data_folder_that_cannot_be_written(run, config, tmp_path):
    (tmp_path / "file").write_text("")
    overrides = [f"--config.data.data_dir={tmp_path / 'file'}"]
    line = run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides)
    assert "cannot be written" in line
    assert not (tmp_path / "run").exists()


def test_folders_and_configs_that_cannot_be_meant(run, config, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "must be a file; sweep trains all" in run("sweep", f"--config={config}:seal", workdir)
    assert "--output= is empty; name a folder" in run("slim", tmp_path, "--output=")
    here = "--config.train.pretrained=."
    says = run("train", f"--config={config}:normal", workdir, here)
    assert "train.pretrained = '.' is not the folder of a run" in says
    assert not (tmp_path / "run").exists()
