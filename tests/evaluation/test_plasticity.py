"""Plasticity: measures against closed forms, the evaluation against the trained network itself."""

import jax
import numpy as np
import optax
import pytest

from seal_jax import UsageError
from seal_jax.core import mesh as meshes
from seal_jax.evaluation import plasticity
from seal_jax.evaluators import plasticity as command
from seal_jax.evaluators.batching import subset
from seal_jax.training import experiment as experiments
from seal_jax.training.batches import place

RANDOM = np.random.default_rng(0)


def with_singular_values(values, rows, columns):
    left, _ = np.linalg.qr(RANDOM.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(RANDOM.normal(size=(columns, columns)))
    middle = np.zeros((rows, columns))
    np.fill_diagonal(middle, values)
    return left @ middle @ right


def test_ranks_by_their_singular_values():
    # Shares 0.5, 0.25, 0.125, 0.125: after three of them 0.875.
    features = with_singular_values([4.0, 2.0, 1.0, 1.0], 9, 4)
    assert [plasticity.effective_rank(features, share) for share in (0.4, 0.7, 0.8, 0.99)] == [
        *(1, 2, 3, 4)
    ]
    # Entropy 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8 = 7/4 ln 2.
    assert plasticity.entropy_rank(features) == pytest.approx(2**1.75)
    for scale in (1e-3, 1e3):
        assert plasticity.entropy_rank(scale * features) == pytest.approx(2**1.75)
    assert plasticity.effective_rank(np.outer(np.arange(5.0), np.ones(3))) == 1


def test_deviation_from_isometry_is_that_of_the_gram_matrix():
    for shape in ((6, 4), (4, 6), (3, 3, 2, 5)):
        kernel = RANDOM.normal(size=shape)
        deviations = []
        for matrix in kernel.reshape(-1, *shape[-2:]):
            gram = matrix.T @ matrix if shape[-2] >= shape[-1] else matrix @ matrix.T
            scaled = gram / (np.trace(gram) / len(gram)) - np.eye(len(gram))
            deviations.append(np.linalg.norm(scaled) / np.sqrt(len(gram)))
        expected = np.mean(deviations)
        assert plasticity.isometry_deviation(kernel) == pytest.approx(expected)
        assert plasticity.isometry_deviation(7 * kernel) == pytest.approx(expected)
    assert plasticity.isometry_deviation(with_singular_values([2.0] * 3, 5, 3)) < 1e-12
    # One singular value alone is the farthest, the root of k - 1.
    assert plasticity.isometry_deviation(np.ones((8, 5))) == pytest.approx(2)
    assert plasticity.isometry_deviation(np.zeros((3, 2, 2))) == 0


def test_bad_input():
    for call, says in (
        (lambda: plasticity.effective_rank(np.ones(3)), r"features is float64\[3\]"),
        (lambda: plasticity.effective_rank(np.ones((3, 3)), 0), r"share = 0 must lie in \(0, 1\]"),
        (lambda: plasticity.entropy_rank(np.full((2, 2), np.nan)), "features hold NaN"),
        (lambda: plasticity.isometry_deviation(np.ones(3)), r"kernel is float64\[3\]: it must be"),
        (lambda: plasticity.norms({"a": np.ones(2)}, ["b"]), "blocks name 'b', which is not in"),
        (lambda: command.Options(share=1.5), "--share=1.5 must lie in"),
        (lambda: command.Options(threshold=-1.0), "--threshold=-1 must be at least 0"),
    ):
        with pytest.raises(UsageError, match=says):
            call()


def test_the_evaluation_measures_the_network(run, loaded_run, evaluated):
    options = {"examples": 40, "batch_size": 24, "threshold": 0.5, "share": 0.9}
    rows, output = evaluated("plasticity", run, weights=("last",), **options)
    model = loaded_run.model
    assert [row["block"] for row in rows] == [*model.blocks] * 2
    network = next(n for n in loaded_run.networks if (n.weights, n.seed) == ("last", 1))
    found = {row["block"]: row for row in rows if row["seed"] == 1}
    sample = subset(loaded_run.dataset.train, 40, 0)
    params, rest = network.variables["params"], {"batch_stats": network.variables["batch_stats"]}
    images = loaded_run.normalise(sample.images)

    @jax.jit
    def all_at_once(params, images):
        def loss(params):
            logits, state = model.module.apply(
                {"params": params, **rest}, images, train=False, capture_intermediates=True
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, sample.labels)
            return losses.mean(), state["intermediates"]

        return jax.grad(loss, has_aux=True)(params)

    gradient, captured = all_at_once(params, images)
    # The weights with which the training itself starts.
    settings, dataset = loaded_run.settings, loaded_run.dataset
    mesh = meshes.make(settings, jax.devices()[:1])
    training = experiments.build(settings, experiments.data_shape(dataset), mesh)
    begun = training.init(training.starts(training.seeds), place(mesh, dataset.train))
    start = jax.tree.map(lambda leaf: np.asarray(leaf[1]), begun.weights.params)
    moved = jax.tree.map(np.subtract, params, start)

    def norm(tree):
        return np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))

    for block, row in found.items():
        trees = [params, moved, gradient]
        for key in block.split("/"):
            trees = [tree[key] for tree in trees]
        of_block = [row["norm"], row["distance"], row["gradient"]]
        np.testing.assert_allclose(of_block, [*map(norm, trees)], rtol=1e-3, atol=1e-6)
        if "block0" in block:
            stage, name = block.split("/")
            inside = captured[stage][name]
            # Units are the ReLU of the first normalisation.
            active = np.maximum(inside["bn1"]["__call__"][0], 0).mean((0, 1, 2))
            assert row["units"] == len(active)
            assert row["dormant"] == pytest.approx((active <= 0.5 * active.mean()).mean())
            outputs = np.asarray(inside["__call__"][0]).mean((1, 2))
            values = np.linalg.svd(outputs, compute_uv=False)
            rank = 1 + int((values.cumsum() / values.sum() < 0.9).sum())
            assert row["rank"] == rank
        else:
            assert row["units"] == 0
            assert row["dormant"] is None
    assert found["bn1"]["isometry"] is None
    assert found["fc"]["rank"] == found["layer3/block0"]["rank"]
    assert (output / "plasticity.png").stat().st_size > 10_000
