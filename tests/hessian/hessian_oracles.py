"""Small problems, and vectors as NumPy sees them."""

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import hessian


def outputs(params, batch):
    hidden = jnp.tanh(batch[0] @ params["one"]["kernel"] + params["one"]["bias"])
    return hidden @ params["two"]["kernel"]


def outer(logits, batch):
    labels = batch[1]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def loss(params, batch):
    return outer(outputs(params, batch), batch)


def ravel(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def unravel(flat, like, library=np):
    leaves, structure = jax.tree.flatten(like)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = library.split(library.asarray(flat, np.float32), cuts)
    return structure.unflatten(
        [jnp.asarray(part).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def vector_of(result, index):
    return ravel(jax.tree.map(lambda rows: rows[index], result.vectors))


_product = jax.jit(lambda op, vector: op(vector))


def as_matrix(op):
    rows = [ravel(_product(op, unravel(row, op.like))) for row in np.eye(op.size)]
    return np.stack(rows, axis=1)


def dense_hessian(params, batches):
    """The Hessian of the mean over batches by jax.hessian on the flat vector, one per batch."""

    def flat_loss(flat, batch):
        return loss(unravel(flat, params, jnp), batch)

    hessians = jax.jit(jax.vmap(jax.hessian(flat_loss), (None, 0)))
    return np.asarray(hessians(jnp.asarray(ravel(params), jnp.float32), batches), np.float64)


def quadratic(x, matrix):
    return 0.5 * x @ matrix @ x


def of_matrix(matrix):
    """The operator of a symmetric matrix."""
    matrix = jnp.asarray(matrix, jnp.float32)
    return hessian.operator(quadratic, jnp.zeros(len(matrix)), matrix[None])


def diagonal(values):
    return of_matrix(np.diag(values))


def rotated(values, seed=0):
    """A dense symmetric matrix of these eigenvalues."""
    count = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, count)))[0]
    return basis * values @ basis.T
