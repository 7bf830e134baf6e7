from __future__ import annotations

import numpy as np
import pytest

from seal_jax.data import Dataset, Split, from_arrays
from seal_jax.errors import UsageError


def arrays(n=20, classes=2, side=4):
    images = np.random.default_rng(n).integers(0, 256, (n, side, side, 1), dtype=np.uint8)
    return images, np.arange(n) % classes


def test_arrays_are_split_and_converted():
    dataset = from_arrays(arrays(), arrays(6), class_names=["a", "b"], validation_fraction=0.2)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (16, 4, 6)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.class_names == ("a", "b")
    assert dataset.image_shape == (4, 4, 1)
    together = np.concatenate([dataset.train.images, dataset.validation.images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, arrays()[0]))


def test_given_validation_is_kept():
    dataset = from_arrays(arrays(20), arrays(6), arrays(8))
    np.testing.assert_array_equal(dataset.validation.images, arrays(8)[0])
    assert len(dataset.train) == 20


def test_validation_may_be_empty():
    dataset = from_arrays(arrays(), arrays(), validation_fraction=0.0)
    assert len(dataset.validation) == 0
    assert dataset.validation.images.shape == (0, 4, 4, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_arrays((arrays()[0] / 255, arrays()[1]), arrays()), "dtype float64"),
        (lambda: from_arrays((arrays()[0][..., 0], arrays()[1]), arrays()), r"\(20, 4, 4\)"),
        (lambda: from_arrays((arrays()[0], arrays()[1] / 2), arrays()), "labels have .*float64"),
        (lambda: from_arrays((arrays()[0], arrays()[1][:5]), arrays()), "20 images but 5 labels"),
        (lambda: from_arrays(arrays(), arrays(classes=3)), "test split has label 2, outside 0..1"),
        (lambda: from_arrays(arrays(), (arrays()[0], arrays()[1] - 1)), "has label -1"),
        (lambda: from_arrays(arrays(), arrays(side=5)), "data.image_size"),
        (lambda: from_arrays(arrays(), arrays(0)), "test split is empty"),
        (
            lambda: from_arrays(arrays(), arrays(), num_classes=2, class_names=["a"]),
            "1 class names for 2 classes",
        ),
    ],
)
def test_unusable_arrays(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_data_set_is_constructible():
    split = Split(arrays()[0], arrays()[1].astype(np.int32))
    dataset = Dataset("mine", 2, ("a", "b"), split, split.rows(np.array([3])), split)
    np.testing.assert_array_equal(dataset.validation.images[0], split.images[3])
