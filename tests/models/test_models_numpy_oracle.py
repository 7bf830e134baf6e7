"""The networks against a plain NumPy transcription, in float64, that shares no code with them."""

import numpy as np


class Oracle:
    def __init__(self, tiny, train):
        self.tiny, self.train, self.new_stats = tiny, train, {}

    def conv(self, x, name, stride=1):
        kernel = self.tiny.params[f"{name}/kernel"].astype(np.float64)
        size = kernel.shape[0]
        pad = (size - 1) // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        rows = (x.shape[1] - size) // stride + 1
        cols = (x.shape[2] - size) // stride + 1
        out = np.zeros((len(x), rows, cols, kernel.shape[3]))
        for i in range(rows):
            for j in range(cols):
                patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
                out[:, i, j] = np.tensordot(patch, kernel, 3)
        return out

    def norm(self, x, name):
        mean, var = (self.tiny.stats[f"{name}/{kind}"] for kind in ("mean", "var"))
        if self.train:
            old_mean, old_var = mean, var
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.new_stats[f"{name}/mean"] = 0.9 * old_mean + 0.1 * mean
            self.new_stats[f"{name}/var"] = 0.9 * old_var + 0.1 * var
        scale, bias = (self.tiny.params[f"{name}/{kind}"] for kind in ("scale", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def block(self, x, name, stride):
        bottleneck = self.tiny.block == "bottleneck"
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        y = x
        for index, step in enumerate(strides, start=1):
            y = self.norm(self.conv(y, f"{name}/conv{index}", step), f"{name}/bn{index}")
            if index < len(strides):
                y = np.maximum(y, 0)
        if self.tiny.shortcut == "A":
            short = np.zeros_like(y)
            short[..., : x.shape[-1]] = x[:, ::stride, ::stride]
        elif f"{name}/downsample_conv/kernel" in self.tiny.params:
            short = self.conv(x, f"{name}/downsample_conv", stride)
            short = self.norm(short, f"{name}/downsample_bn")
        else:
            short = x
        return np.maximum(y + short, 0)

    def pool(self, x):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        rows, cols = ((side - 3) // 2 + 1 for side in x.shape[1:3])
        out = [
            [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(cols)]
            for i in range(rows)
        ]
        return np.moveaxis(np.array(out), 2, 0)

    def __call__(self):
        imagenet = self.tiny.stem == "imagenet"
        x = self.conv(self.tiny.images.astype(np.float64), "conv1", 2 if imagenet else 1)
        x = np.maximum(self.norm(x, "bn1"), 0)
        if imagenet:
            x = self.pool(x)
        x = self.block(x, "layer1/block0", 1)
        x = self.block(x, "layer1/block1", 1)
        x = self.block(x, "layer2/block0", 2)
        return x.mean((1, 2)) @ self.tiny.params["fc/kernel"] + self.tiny.params["fc/bias"]


def test_inference_agrees(tiny):
    np.testing.assert_allclose(tiny.inferred, Oracle(tiny, train=False)(), rtol=1e-4, atol=1e-4)


def test_training_and_the_running_statistics_agree(tiny):
    oracle = Oracle(tiny, train=True)
    np.testing.assert_allclose(tiny.trained, oracle(), rtol=1e-4, atol=1e-4)
    assert set(tiny.new_stats) == set(oracle.new_stats)
    for path, value in oracle.new_stats.items():
        np.testing.assert_allclose(tiny.new_stats[path], value, 1e-4, 1e-4, err_msg=path)
