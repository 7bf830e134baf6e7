"""Subsets, long tails and labels of a training split, against their definitions."""

import numpy as np
import pytest

from seal_jax.data import from_arrays, study
from seal_jax.data.studies import class_counts, noisy_labels, read_labels, subset_rows
from seal_jax.errors import UsageError

LABELS = np.repeat(np.arange(5, dtype=np.int32), 40)[np.random.default_rng(0).permutation(200)]


@pytest.fixture(scope="module")
def dataset():
    """200 images, each of its own grey levels, of five classes."""
    images = np.arange(200, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 1), np.uint8)
    return from_arrays((images, LABELS), (images[:5], LABELS[:5]), validation_fraction=0.0)


def numbers_of(split):
    """Return which images a split has."""
    return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("most", "ratio", "classes"), [(5000, 100, 10), (500, 10, 100), (40, 7, 5)]
)
def test_long_tails_are_those_of_the_authors_code(most, ratio, classes):
    """``img_max * imb_factor ** (cls_idx / (cls_num - 1))`` of LDAM-DRW, as an integer."""
    expected = [int(most * (1 / ratio) ** (index / (classes - 1))) for index in range(classes)]
    assert class_counts(np.full(classes, most), 0, ratio).tolist() == expected
    assert class_counts(np.full(classes, 2 * most), most, ratio).tolist() == expected


def test_the_longest_tail_that_unequal_classes_allow():
    available = np.array([100, 20, 30])
    counts = class_counts(available, 0, 4.0)
    assert counts.tolist() == [40, 20, 10]
    assert class_counts(np.array([3]), 0, 4.0).tolist() == [3]  # one class has no tail


def test_subsets_are_nested_and_by_seed():
    few, many = (set(subset_rows(LABELS, 5, count, 1.0, seed=3).tolist()) for count in (4, 9))
    assert few < many
    assert np.bincount(LABELS[sorted(many)]).tolist() == [9] * 5
    assert few != set(subset_rows(LABELS, 5, 4, 1.0, seed=4).tolist())


def test_noise_is_of_the_other_classes_exactly_and_nested():
    labels = np.repeat(np.arange(4, dtype=np.int32), 3000)
    noisy = noisy_labels(labels, 4, 0.3, seed=0)
    assert noisy.dtype == np.int32
    wrong = noisy != labels
    assert wrong.sum() == round(0.3 * 12000)
    # Each of the three other classes as often: 3600 images, of standard deviation 28 each.
    shifts = np.bincount((noisy - labels)[wrong] % 4, minlength=4)
    assert (np.abs(shifts[1:] - 1200) < 140).all()
    less = noisy_labels(labels, 4, 0.1, seed=0)
    changed = less != labels
    np.testing.assert_array_equal(less[changed], noisy[changed])
    assert (noisy_labels(labels, 4, 0.3, seed=1) != noisy).any()


def test_validation_and_test_stay_as_they_are(dataset):
    plain = study(dataset, validation_fraction=0.2)
    changed = study(
        dataset, validation_fraction=0.2, train_count=20, imbalance=2.0, label_noise=0.5
    )
    for name in ("validation", "test"):
        a, b = getattr(plain, name), getattr(changed, name)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert b.clean_labels is None
    assert set(numbers_of(changed.train)) < set(numbers_of(plain.train))
    np.testing.assert_array_equal(np.bincount(changed.train.clean_labels), [20, 16, 14, 11, 10])
    # Labels and clean labels are those of the images.
    rows = numbers_of(changed.train)
    np.testing.assert_array_equal(changed.train.clean_labels, LABELS[rows])
    np.testing.assert_array_equal(changed.train.labels, changed.label_record[rows])
    assert (changed.train.labels != LABELS[rows]).sum() == 36  # half of 71, up
    left_out = np.setdiff1d(np.arange(200), rows)
    np.testing.assert_array_equal(changed.label_record[left_out], LABELS[left_out])


def test_nothing_is_changed_or_copied_by_default(dataset):
    same = study(dataset)
    assert same.train is dataset.train
    assert same.label_record is None
    assert len(same.validation) == 0


@pytest.mark.parametrize("name", ["labels.npy", "labels.txt"])
def test_a_file_of_labels_is_of_the_stored_order(dataset, tmp_path, name):
    given, path = (LABELS + 1) % 5, tmp_path / name
    np.save(path, given) if name.endswith("npy") else np.savetxt(path, given, fmt="%d")
    changed = study(dataset, validation_fraction=0.2, label_file=str(path))
    rows = numbers_of(changed.train)
    np.testing.assert_array_equal(changed.train.labels, given[rows])
    np.testing.assert_array_equal(changed.train.clean_labels, LABELS[rows])
    held_out = study(dataset, validation_fraction=0.2).validation
    np.testing.assert_array_equal(changed.validation.labels, held_out.labels)


def test_what_one_study_recorded_gives_another_the_same_labels(dataset, tmp_path):
    noisy = study(dataset, validation_fraction=0.2, label_noise=0.4, label_noise_seed=7)
    np.save(tmp_path / "labels.npy", noisy.label_record)
    again = study(dataset, validation_fraction=0.2, label_file=str(tmp_path / "labels.npy"))
    np.testing.assert_array_equal(again.train.labels, noisy.train.labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("1\nx\n", "holds no integers"),
        (f"{2**70}\n", "holds no integers"),
        ("", r"holds int64\[0\]: give one integer for each of the 3 images"),
        ("1\n1\n", r"holds int64\[2\]"),
        (np.zeros(3), r"holds float64\[3\]"),
        (np.zeros((3, 1), int), r"holds int64\[3, 1\]"),
        (np.array([0, 4, 7]), r"has label 4 for image 1: give 0\.\.3"),
        (np.array([0, 1, -1]), "has label -1 for image 2"),
        (b"no array", "holds no integers"),
    ],
)
def test_files_of_labels_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / ("labels.txt" if isinstance(content, str) else "labels.npy")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=rf"^data\.label_file = '.*' {message}") as caught:
        read_labels(str(path), 3, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_count": 41}, "train_count = 41 needs 41 training images of class 0, which has 40"),
        ({"train_count": 3, "imbalance": 9.0}, "train_count = 3 leaves class 3 without"),
        ({"imbalance": 1000.0}, "imbalance = 1000 leaves class 3 without a training image: lower"),
        ({"label_noise": 0.001}, "label_noise = 0.001 changes no label of 200 training images"),
    ],
)
def test_studies_that_the_data_does_not_allow(dataset, fields, message):
    with pytest.raises(UsageError, match=rf"^data\.{message}"):
        study(dataset, **fields)


def test_one_class_has_no_wrong_label():
    with pytest.raises(UsageError, match="there is one class only"):
        noisy_labels(np.zeros(10, np.int32), 1, 0.5, seed=0)
