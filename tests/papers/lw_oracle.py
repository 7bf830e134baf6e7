"""The training of the synthetic experiment in NumPy, float64: forward, backward and events by hand."""

import numpy as np

QUICK = {"steps": 1, "test_size": 8}


def forward(params, normaliser, x, position):
    """Return logits and what the backward pass needs; x is [features, examples]."""
    mean, scale = normaliser
    kept, hidden = [], x
    for index, (kernel, bias) in enumerate(params):
        inputs, z = hidden, kernel @ hidden + bias
        last = index == len(params) - 1
        relu = (lambda value: value) if last else (lambda value: np.maximum(value, 0))
        if position == "after":
            raw = relu(z)
            hidden = (raw - mean[index]) * scale[index]
            slope = (z > 0) * scale[index] if not last else np.full_like(z, scale[index])
        else:
            raw = z
            normalised = (z - mean[index]) * scale[index]
            hidden = relu(normalised)
            slope = (normalised > 0) * scale[index] if not last else np.full_like(z, scale[index])
        kept.append((inputs, slope, raw))
    return hidden, kept


def softmax(logits):
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


def loss(params, normaliser, x, labels, position):
    logits, _ = forward(params, normaliser, x, position)
    return -np.log(softmax(logits)[labels, np.arange(len(labels))]).mean()


def accuracy(params, normaliser, x, labels, position):
    return (forward(params, normaliser, x, position)[0].argmax(0) == labels).mean()


def gradient(params, normaliser, x, labels, position, penalty):
    logits, kept = forward(params, normaliser, x, position)
    delta = (softmax(logits) - np.eye(len(logits))[labels].T) / len(labels)
    gradients = []
    for (kernel, _), (inputs, slope, _) in zip(params[::-1], kept[::-1], strict=True):
        delta = delta * slope
        gradients.append((delta @ inputs.T + 2 * penalty * kernel, delta.sum(1, keepdims=True)))
        delta = kernel.T @ delta
    return gradients[::-1]


class Network:
    """A network in training, with the events of the methods."""

    def __init__(self, params, alpha, data, *, position="after", penalty=0.0, epsilon=1e-6):
        self.params = [(np.float64(kernel), np.float64(bias)) for kernel, bias in params]
        self.norms = [np.linalg.norm(kernel) for kernel, _ in self.params]
        self.normaliser = [np.zeros(3), np.ones(3)]
        x, self.labels = data
        self.x = np.float64(x)
        self.x[:3] *= alpha
        self.position, self.penalty, self.epsilon = position, penalty, epsilon

    def steps(self, count, learning_rate):
        for _ in range(count):
            gradients = gradient(
                self.params, self.normaliser, self.x, self.labels, self.position, self.penalty
            )
            self.params = [
                (kernel - learning_rate * dk, bias - learning_rate * db)
                for (kernel, bias), (dk, db) in zip(self.params, gradients, strict=True)
            ]

    def rescale(self, layers):
        for index in layers:
            kernel, bias = self.params[index]
            self.params[index] = (kernel * self.norms[index] / np.linalg.norm(kernel), bias)

    def normalise(self, block):
        self.normaliser[0][block], self.normaliser[1][block] = 0, 1
        raw = forward(self.params, self.normaliser, self.x, self.position)[1][block][2]
        self.normaliser[0][block] = raw.mean()
        self.normaliser[1][block] = 1 / (raw.std() + self.epsilon)

    def reinitialise(self, fresh, layers):
        for index in layers:
            self.params[index] = tuple(np.float64(array) for array in fresh[index])

    def reinitialise_kernels(self, fresh, masks):
        for index, mask in enumerate(masks):
            kernel, bias = self.params[index]
            self.params[index] = (np.where(mask, fresh[index][0], kernel), bias)

    def measured(self, test):
        x, labels = np.float64(test[0]), test[1]
        x[:3] *= self.x[0, 0] / np.sign(self.x[0, 0])
        rest = (self.params, self.normaliser)
        return (
            accuracy(*rest, x, labels, self.position),
            accuracy(*rest, self.x, self.labels, self.position),
            loss(*rest, self.x, self.labels, self.position),
        )
