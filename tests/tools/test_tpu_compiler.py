"""Two small programs, compiled by the TPU compiler: their collectives, and that no step becomes more expensive."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.mark.parametrize(
    ("options", "cycles", "collectives"),
    [
        pytest.param(
            ["--config=configs/digits_resnet8.py:seal"],
            273_287,
            {("all-reduce", "gradient_reduce"): 1, ("all-reduce", "batch_norm"): 14},
            id="SEAL",
        ),
        pytest.param(
            [
                "--config=configs/pof_cifar10.py:pof",
                "--config.model.name=wrn10-1",
                "--config.data.train_count=200",
            ],
            926_575,
            {
                ("all-reduce", "gradient_reduce"): 1,
                ("all-reduce", "batch_norm"): 14,
                # Features and labels of the weak batch.
                ("all-gather", "all_gather"): 1,
                ("all-reduce", "all_gather"): 1,
            },
            id="PoF",
        ),
    ],
)
def test_collectives_and_cycles_of_a_step(options, cycles, collectives, tmp_path):
    """A batch over eight chips, BatchNorm global; ``cycles`` a step were estimated by libtpu 0.0.52."""
    output = tmp_path / "report.json"
    # A process of its own, without the settings of the tests, of which libtpu refuses some.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }
    command = [sys.executable, "-m", "tools.preflight", *options, "--config.train.seeds=1"]
    subprocess.run(
        [*command, "--topology=v5e:2x4", f"--json={output}"], env=environment, check=True
    )
    report = json.loads(output.read_text())
    counted = {
        (each["operation"], each["cause"]): each["count"]
        for each in report["collectives"]
        if each["in_loop"]
    }
    # Fewer are welcome: then these numbers are to be lowered.
    assert counted == collectives
    assert report["cycles_per_step"] <= 1.05 * cycles
    assert report["fits"]
