"""Loss, gradient and Hessian of a softmax classifier in NumPy, float64, in closed form.

Parameters are one matrix [1 + features, classes], the bias first.
"""

import numpy as np


def inputs_of(features):
    return np.concatenate([np.ones((len(features), 1)), np.asarray(features, np.float64)], axis=1)


def matrix_of(head):
    return np.concatenate([np.asarray(head["bias"])[None], np.asarray(head["kernel"])]).astype(
        np.float64
    )


def targets_of(labels, classes, smoothing):
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def loss(features, labels, matrix, smoothing=0.0):
    logits = inputs_of(features) @ matrix
    top = np.max(logits, axis=1)
    sums = np.log(np.exp(logits - top[:, None]).sum(1)) + top
    targets = targets_of(labels, matrix.shape[1], smoothing)
    return float((sums - (targets * logits).sum(1)).mean())


def losses_along(features, labels, matrix, direction, distances, smoothing=0.0):
    """The losses at ``matrix - t * direction`` for every distance t."""
    start, slope = (inputs_of(features) @ part for part in (matrix, direction))
    logits = start - distances[:, None, None] * slope
    top = logits.max(2)
    sums = np.log(np.exp(logits - top[..., None]).sum(2)) + top
    targets = targets_of(labels, matrix.shape[1], smoothing)
    return (sums - (targets * logits).sum(2)).mean(1)


def derivatives(features, labels, matrix, smoothing=0.0):
    """The gradient, and x x' times diag(p) - p p', both over the flat matrix."""
    inputs, classes = inputs_of(features), matrix.shape[1]
    logits = inputs @ matrix
    p = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = inputs.T @ (p - targets_of(labels, classes, smoothing)) / len(labels)
    curved = np.einsum("nk,kl->nkl", p, np.eye(classes)) - np.einsum("nk,nl->nkl", p, p)
    whole = np.einsum("ni,nj,nkl->ikjl", inputs, inputs, curved, optimize=True) / len(labels)
    return gradient.ravel(), whole.reshape(matrix.size, matrix.size)
