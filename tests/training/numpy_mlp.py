"""The MLP of the trainer in NumPy float64, with its derivatives written out."""

import jax
import numpy as np

HIDDEN = ("dense1", "dense2")


def wide(tree):
    """Return a tree of float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def forward(params, images):
    """Return the inputs of every layer, and the logits."""
    inputs = [images.reshape(len(images), -1)]
    for name in HIDDEN:
        layer = params[name]["linear"]
        inputs.append(np.maximum(inputs[-1] @ layer["kernel"] + layer["bias"], 0))
    return inputs, logits(params["fc"], inputs[-1])


def logits(classifier, features):
    return features @ classifier["kernel"] + classifier.get("bias", 0)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def smoothed(labels, classes=4, smoothing=0.1):
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def cross_entropy(logits, labels, smoothing=0.1):
    return -(smoothed(labels, logits.shape[-1], smoothing) * log_softmax(logits)).sum(-1).mean()


def head_gradient(classifier, features, labels, smoothing=0.1):
    scores = softmax(logits(classifier, features))
    slopes = (scores - smoothed(labels, scores.shape[-1], smoothing)) / len(labels)
    gradient = {"kernel": features.T @ slopes, "bias": slopes.sum(0)}
    return {name: gradient[name] for name in classifier}, slopes


def loss_and_gradient(params, images, labels, smoothing=0.1):
    """Return the mean cross entropy and its gradient by all parameters."""
    inputs, scores = forward(params, images)
    found, slopes = head_gradient(params["fc"], inputs[-1], labels, smoothing)
    gradient = {"fc": found}
    slopes = slopes @ params["fc"]["kernel"].T
    for index in (1, 0):
        slopes = slopes * (inputs[index + 1] > 0)
        layer = params[HIDDEN[index]]["linear"]
        gradient[HIDDEN[index]] = {
            "linear": {"kernel": inputs[index].T @ slopes, "bias": slopes.sum(0)}
        }
        slopes = slopes @ layer["kernel"].T
    return cross_entropy(scores, labels, smoothing), gradient


def norm(tree):
    return np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))


def add(a, factor, b):
    """Return a + factor b, trees."""
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


def rate(step, peak=0.05, steps_per_epoch=5, epochs=4):
    """Return the cosine of the trainer, which falls from epoch to epoch."""
    epoch = step // steps_per_epoch % epochs
    return 0.5 * peak * (1 + np.cos(np.pi * epoch / epochs))
