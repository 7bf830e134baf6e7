from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.core.settings import Data, Settings
from seal_jax.data import STATISTICS, Split
from seal_jax.errors import UsageError
from seal_jax.training.batches import epoch_order, flatten, padded_batches, steps_per_epoch, take
from seal_jax.training.experiment import augmentation_of


@pytest.mark.parametrize(
    ("name", "key"),
    [("svhn_cropped", "svhn"), ("cifar10:3.0.2", "cifar10"), ("cassava", "imagenet")],
)
def test_the_statistics_are_those_of_the_data_set(name, key):
    spec = augmentation_of(Settings(data=Data(name=name)), (32, 32, 3))
    assert (spec.mean, spec.std) == STATISTICS[key]


def test_taken_rows_are_the_images():
    random = np.random.default_rng(0)
    split = Split(
        random.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8), np.arange(7, dtype=np.int32)
    )
    flat = flatten(split)
    assert flat.shape == (7, 128)  # 60 bytes, filled up to a TPU's lanes
    assert not flat[:, 60:].any()
    rows = np.array([6, 0, 3])
    taken = jax.jit(take, static_argnums=2)(jnp.asarray(flat), jnp.asarray(rows), (4, 5, 3))
    assert taken.dtype == jnp.uint8
    np.testing.assert_array_equal(taken, split.images[rows])


order = jax.jit(epoch_order, static_argnums=(1, 2, 3))


def test_epoch_visits_everything_once():
    rows, weights = order(jax.random.key(0), 12, 4, True)
    assert rows.shape == weights.shape == (3, 4)
    assert rows.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    assert sorted(rows.ravel().tolist()) == list(range(12))
    assert (weights == 1).all()


def test_remainder_is_dropped():
    rows, weights = order(jax.random.key(0), 11, 4, True)
    assert rows.shape == (2, 4)
    assert len(set(rows.ravel().tolist())) == 8
    assert (weights == 1).all()


def test_remainder_is_filled_from_the_start():
    rows, weights = order(jax.random.key(0), 11, 4, False)
    flat = rows.ravel()
    assert rows.shape == (3, 4)
    assert sorted(flat[:11].tolist()) == list(range(11))
    assert flat[11] == flat[0]
    assert weights.ravel().tolist() == [1.0] * 11 + [0.0]


def test_orders_differ_by_key_alone():
    first, again, other = (order(jax.random.key(k), 64, 8, True)[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("n", "batch"), [(10, 11), (10, 0), (0, 1)])
def test_batch_must_fit(n, batch):
    with pytest.raises(UsageError, match=f"train.batch_size = {batch} must lie in 1..{n}"):
        steps_per_epoch(n, batch)
    with pytest.raises(UsageError, match=r"train.batch_size"):
        epoch_order(jax.random.key(0), n, batch)


@pytest.mark.parametrize(("n", "batch"), [(10, 5), (10, 4), (3, 8), (1, 1), (0, 4)])
def test_evaluation_weighs_each_example_once(n, batch):
    rows, weights = padded_batches(n, batch)
    assert rows.shape == weights.shape == (-(-n // batch), batch)
    assert rows.dtype == np.int32
    assert weights.dtype == np.float32
    assert rows[weights == 1].tolist() == list(range(n))
    assert (rows < max(n, 1)).all()
    with pytest.raises(UsageError, match="batch = 0"):
        padded_batches(n, 0)
