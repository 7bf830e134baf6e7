"""Programs are lowered with the shapes that the trainer and the evaluators pass."""

import jax
import pytest

from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Data, Model, Run, Settings, Train
from seal_jax.errors import UsageError
from seal_jax.evaluators import few_shot, hessian
from seal_jax.training import experiment as experiments
from tools.preflight import command, programs


def build(name, **fields):
    settings = Settings(
        data=Data(name="digits", validation_fraction=0.75),
        model=Model(name=name, **fields),
        train=Train(seeds=2, batch_size=32),
        run=Run(eval_batch_size=100),
    )
    mesh = meshes.make(settings, jax.devices())
    return experiments.build(settings, programs.data_shape(settings), mesh)


@pytest.fixture(scope="module")
def experiment():
    return build("resnet8", width=4)


def shapes(program):
    return [leaf.shape for leaf in jax.tree.leaves(program.lowered.in_avals)]


def test_scoring_is_that_of_the_test_images(experiment):
    program = programs.evaluate(experiment, None, 2.0)
    # 360 images in batches of 100; two seeds on eight devices.
    assert program.steps == 4
    assert program.run.steps * program.run.images_per_step == 2 * 360
    assert {(360, 128), (360,), (4, 100)} <= set(shapes(program))


def test_a_product_is_over_the_training_images(experiment):
    program = programs.hessian(experiment, hessian.Options(data_batch_size=120), None)
    # 359 images in batches of 120, which eight devices divide.
    assert (program.steps, program.run.chips) == (3, 8)
    assert (3, 120, 8, 8, 1) in shapes(program)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(experiment.context.params))
    vector = program.lowered.in_avals[0][1]
    assert sum(leaf.size for leaf in jax.tree.leaves(vector)) == parameters


def test_episodes_are_those_of_a_work_item(experiment):
    options = few_shot.Options(shots=(1, 5), episodes=30, affines_chunk=20, epochs=7)
    program = programs.few_shot(experiment, options, None)
    # 20 rounded up to eight devices; 5 classes of 5 shots and 15 queries.
    assert (24, 100, 64) in shapes(program)
    assert (program.steps, program.run.steps) == (7, 2 * 7)
    with pytest.raises(UsageError, match=r"^--program=few_shot: mlp has no BatchNorm"):
        programs.few_shot(build("mlp"), options, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--program=x"], "--program = 'x' must be one of train, evaluate, hessian, few_shot"),
        (["--program"], "expected one argument"),
        (["--shots=5"], "--shots=5 is not an option of preflight"),
        (["--program=few_shot", "--shots=0"], "shots = 0 must be a whole number of at least 1"),
        (["--seeds=8,x"], "--seeds=8,x must be numbers above 0, such as 8,16,32"),
    ],
)
def test_bad_options(options, message, capfd):
    assert command.run(["--config=configs/digits.py", *options]) == 2
    assert message in capfd.readouterr().err
