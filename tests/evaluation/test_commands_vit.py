"""Every kind of evaluation on a run of a tiny ViT: outputs of blocks are tokens, and nothing has BatchNorm."""

import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.core import settings as settings_lib
from seal_jax.evaluators.loaded_run import LoadedRun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(trained):
    return trained(
        "vit",
        model=settings_lib.Model(name="vit_small_patch16", patch=4, width=8, depth=2),
        seeds=1,
        remat=True,
    )


OPTIONS = {
    "linear_probe": {"datasets": ("digits",), "epochs": 1, "features": "block1"},
    "few_shot": {
        "datasets": ("digits",), "heads": ("linear",), "shots": (1,), "episodes": 2, "epochs": 2,
    },
    "prediction_depth": {"images": 40, "pooling": "gap"},
    "margins": {"count": 20, "sample": 100},
    "flatness": {"sigmas": (0.0, 0.1), "draws": 1},
    "hessian": {"parts": ("eigenvalues",), "examples": 40, "eigenvalues": 1, "tolerance": 0.1},
    "landscape": {"examples": 40, "points": 3},
    "gradients": {"examples": 40, "batches": 2, "eigenvectors": 1},
    "perturbations": {"batches": 2, "rho": 0.05, "gamma": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_evaluates_it(vit, evaluated, kind):
    rows, output = evaluated(kind, vit, weights=("last",), **OPTIONS[kind])
    assert rows
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    assert (output / "results.json").exists()


def test_pooled_tokens_are_their_mean(vit):
    loaded_run = LoadedRun(vit, weights=("last",))
    network, images = loaded_run.networks[0], loaded_run.dataset.test.images[:8]
    outputs = loaded_run.model.features(network.variables, loaded_run.normalise(images))
    assert outputs["block1"].shape == (8, 5, 8)  # the class token and four patches
    from seal_jax.evaluation.prediction_depth import pool

    mean = np.asarray(outputs["block1"], np.float64).mean(1)
    np.testing.assert_allclose(pool(outputs["block1"], "gap"), mean, rtol=1e-5, atol=1e-6)
    assert pool(outputs["block1"], "adaptive").shape == (8, 40)


def test_heads_that_need_batch_norm_are_refused(vit, evaluated):
    options = {**OPTIONS["few_shot"], "heads": ("linear_affines",)}
    with pytest.raises(UsageError, match="has no BatchNorm"):
        evaluated("few_shot", vit, weights=("last",), **options)
