"""Choosing the best weights by the test split is there for comparison, and says so everywhere."""

import dataclasses

import jax
import pytest

from seal_jax import UsageError
from seal_jax.core import mesh as meshes
from seal_jax.core import settings
from seal_jax.training import experiment


def test_the_test_split_chooses_only_where_asked_for(tmp_path):
    fields = settings.Data(data_dir=str(tmp_path), validation_fraction=0.0, selection="test_best")
    dataset = experiment.load_data(fields)
    assert dataset.validation is dataset.test
    held_out = dataclasses.replace(fields, selection="validation", validation_fraction=0.2)
    other = experiment.load_data(held_out)
    assert len(other.train) + len(other.validation) == len(dataset.train)
    asked = settings.Settings(data=fields, model=settings.Model(name="mlp"))
    mesh = meshes.make(asked, jax.devices()[:1])
    built = experiment.build(asked, experiment.data_shape(dataset), mesh)
    assert "ON THE TEST SPLIT" in built.summary()


def test_not_together_with_a_validation_split():
    with pytest.raises(UsageError, match=r"set data\.validation_fraction = 0"):
        settings.Settings(data=settings.Data(selection="test_best"))
