"""Mini-batch gradients and the Hessian of a softmax classifier, against its closed form in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from softmax_oracle import derivatives

from seal_jax import UsageError, hessian
from seal_jax.evaluation import gradients

CLASSES, SIZE = 3, 4


def loss(weights, batch):
    features, labels = batch
    logits = features @ weights["fc"]["kernel"] + weights["fc"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    features = random.normal(size=(12, 8, SIZE))
    labels = random.integers(0, CLASSES, (12, 8))
    kernel, bias = random.normal(size=(SIZE, CLASSES)), random.normal(size=CLASSES)
    weights = {
        "other": jnp.ones(2),
        "fc": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)},
    }
    data = (jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32))
    return weights, data, (features, labels, np.concatenate([bias[None], kernel]))


def flat(tree):
    """Bias first, then the kernel: rows [inputs with a leading 1, classes]."""
    return np.concatenate([np.ravel(tree["fc"]["bias"]), np.ravel(tree["fc"]["kernel"])])


def test_curvatures_and_cosines_equal_the_closed_form(problem):
    weights, data, (features, labels, matrix) = problem
    whole = derivatives(features.reshape(-1, SIZE), labels.ravel(), matrix)[1]
    op = hessian.operator(loss, weights, data, mask="fc")
    pairs = hessian.eigenpairs(op, 4, tolerance=1e-6)
    values, basis = np.linalg.eigh(whole)
    np.testing.assert_allclose(pairs.values, values[::-1][:4], rtol=1e-4)

    result = gradients.probe(loss, weights, data, data, pairs.vectors, mask="fc", chunk=5)
    best = []
    for b in range(len(features)):
        gradient, batch_hessian = derivatives(features[b], labels[b], matrix)
        norm = np.linalg.norm(gradient)
        unit = gradient / norm
        np.testing.assert_allclose(result.norms[b], norm, rtol=1e-5)
        np.testing.assert_allclose(result.curvatures[b], unit @ whole @ unit, rtol=1e-4)
        np.testing.assert_allclose(result.own_curvatures[b], unit @ batch_hessian @ unit, rtol=1e-4)
        for index in range(4):
            vector = jax.tree.map(lambda rows, i=index: rows[i], {"fc": pairs.vectors["fc"]})
            np.testing.assert_allclose(result.cosines[b, index], flat(vector) @ unit, atol=1e-5)
        best.append(np.argmax(np.abs(basis.T[::-1] @ unit)))  # among all eigenvectors
    strongest = gradients.strongest(result.cosines)
    assert strongest.certain.any()
    np.testing.assert_array_equal(
        strongest.eigenvector[strongest.certain], np.array(best)[strongest.certain]
    )
    assert (np.asarray(result.curvatures) <= pairs.values[0] * (1 + 1e-4)).all()


def quadratic(weights, batch):
    return jnp.sum(jnp.array([5.0, 3.0, 2.0]) * weights**2) / 2 + weights @ batch


def test_a_gradient_along_an_eigenvector_counts_for_it():
    """Batch b pulls along axis b: the gradient at 0 is that axis, its curvature that eigenvalue."""
    batches = jnp.eye(3) * jnp.array([[2.0], [-7.0], [1e-3]])
    op = hessian.operator(quadratic, jnp.zeros(3), batches)
    pairs = hessian.eigenpairs(op, 3, tolerance=1e-6)
    result = gradients.probe(quadratic, jnp.zeros(3), batches, batches, pairs.vectors)
    np.testing.assert_allclose(result.curvatures, [5, 3, 2], rtol=1e-5)
    np.testing.assert_allclose(result.norms, [2, 7, 1e-3], rtol=1e-6)
    strongest = gradients.strongest(result.cosines)
    assert strongest.eigenvector.tolist() == [0, 1, 2]
    assert strongest.certain.all()
    np.testing.assert_allclose(strongest.captured, 1, rtol=1e-5)
    two = gradients.strongest(result.cosines[:, :2])
    assert two.certain.tolist() == [True, True, False]


def test_a_zero_gradient_gives_no_nan():
    result = gradients.probe(quadratic, jnp.zeros(3), jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    assert result.cosines.shape == (1, 0)
    assert all(float(leaf.sum()) == 0 for leaf in result)


def test_mini_batches_go_through_the_data_in_epochs():
    rows = gradients.mini_batches(10, 4, 5, seed=3)
    assert rows.shape == (5, 4)
    for epoch in (rows[:2], rows[2:4]):
        assert len(set(epoch.ravel().tolist())) == 8
    assert (rows[:2] != rows[2:4]).any()
    # Batch i does not depend on how many there are.
    np.testing.assert_array_equal(rows[:3], gradients.mini_batches(10, 4, 3, seed=3))
    assert (rows != gradients.mini_batches(10, 4, 5, seed=4)).any()
    assert sorted(gradients.mini_batches(10, 10, 1).ravel().tolist()) == list(range(10))
    with pytest.raises(UsageError, match=r"batch_size = 11 must be a whole number in 1\.\.10"):
        gradients.mini_batches(10, 11, 1)
    with pytest.raises(UsageError, match="batches = 0 must be"):
        gradients.mini_batches(10, 2, 0)
