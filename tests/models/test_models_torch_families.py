"""Every class of networks against a torch transcription, with normalisers inserted (needs torch)."""

import jax
import numpy as np
import pytest
from flax import traverse_util

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Twin:
    """Layers by path, on images laid out as torch has them."""

    def __init__(self, variables, norm, train):
        flat = traverse_util.flatten_dict(variables, sep="/")
        self.leaves = {path: torch.tensor(np.array(leaf)) for path, leaf in flat.items()}
        self.norm_kind, self.train = norm, train

    def conv(self, x, path, stride=1):
        kernel = self.leaves[f"params/{path}/kernel"].permute(3, 2, 0, 1)
        groups = x.shape[1] // kernel.shape[1]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2, groups=groups)

    def norm(self, x, path):
        scale, bias = (self.leaves[f"params/{path}/{leaf}"] for leaf in ("scale", "bias"))
        if self.norm_kind == "layer":
            return F.group_norm(x, 1, scale, bias, 1e-5)
        mean, var = (self.leaves[f"batch_stats/{path}/{leaf}"] for leaf in ("mean", "var"))
        return F.batch_norm(x, mean, var, scale, bias, self.train, 0.1, 1e-5)

    def linear(self, x, path):
        bias = self.leaves.get(f"params/{path}/bias")
        return F.linear(x, self.leaves[f"params/{path}/kernel"].T, bias)

    def inserted(self, x, path):
        mean, scale = (self.leaves[f"normalisers/{path}/{leaf}"] for leaf in ("mean", "scale"))
        return (x - mean) * scale

    def conv_block(self, x, path, stride=1):
        return self.inserted(
            self.norm(self.conv(x, f"{path}/conv", stride), f"{path}/norm").relu(), path
        )

    def flatten(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def wide_resnet(twin, x, stride_on="first"):
    x = twin.conv(x, "conv1")
    for stage, stride in enumerate((1, 2, 2), start=1):
        path = f"layer{stage}/block0"
        first, second = (stride, 1) if stride_on == "first" else (1, stride)
        y = twin.norm(x, f"{path}/bn1").relu()
        x = twin.conv(y, f"{path}/downsample_conv", stride)
        y = twin.norm(twin.conv(y, f"{path}/conv1", first), f"{path}/bn2").relu()
        x = twin.inserted(x + twin.conv(y, f"{path}/conv2", second), path)
    return twin.linear(twin.norm(x, "bn").relu().mean((2, 3)), "fc")


def resnet(twin, x):
    x = twin.norm(twin.conv(x, "conv1"), "bn1").relu()
    for stage, stride in ((1, 1), (2, 2)):
        path = f"layer{stage}/block0"
        y = twin.norm(twin.conv(x, f"{path}/conv1", stride), f"{path}/bn1").relu()
        y = twin.norm(twin.conv(y, f"{path}/conv2"), f"{path}/bn2")
        if stride != 1:
            x = twin.conv(x, f"{path}/downsample_conv", stride)
            x = twin.norm(x, f"{path}/downsample_bn")
        x = twin.inserted((x + y).relu(), path)
    return twin.linear(x.mean((2, 3)), "fc")


def scnn(twin, x, pool=2):
    for index in range(1, 5):
        x = twin.conv_block(x, f"block{index}")
        if index in (2, 4):
            x = F.max_pool2d(x, pool, 2, padding=pool - 2)
    x = twin.norm(twin.linear(twin.flatten(x), "dense/linear"), "dense/norm").relu()
    return twin.linear(x, "fc")


def vgg(twin, x):
    for index in range(1, 6):
        x = twin.conv_block(x, f"block{index}")
        if index in (1, 3):  # 8x6, 4x3, 2x1: nothing would be left of the third
            x = F.max_pool2d(x, 2)
    x = twin.linear(twin.flatten(x), "dense1/linear").relu()
    return twin.linear(twin.linear(x, "dense2/linear").relu(), "fc")


def mobilenet(twin, x):
    x = twin.conv_block(x, "block1", 2)
    for path, stride in (("block2", 1), ("block3", 2)):
        x = twin.norm(twin.conv(x, f"{path}/depthwise", stride), f"{path}/norm1").relu()
        x = twin.norm(twin.conv(x, f"{path}/pointwise"), f"{path}/norm2").relu()
        x = twin.inserted(x, path)
    return twin.linear(x.mean((2, 3)), "fc")


def mlp(twin, x):
    x = twin.flatten(x)
    for path in ("dense1", "dense2"):
        x = twin.linear(x, f"{path}/linear")
        if twin.norm_kind != "none":
            x = twin.norm(x, f"{path}/norm")
        x = twin.inserted(x.relu(), path)
    return twin.linear(x, "fc")


CASES = [
    (wide_resnet, {}),
    (wide_resnet, {"stride_on": "second"}),
    (resnet, {"norm": "layer"}),
    (scnn, {}),
    (scnn, {"norm": "batch", "pool": 3}),
    (vgg, {}),
    (mobilenet, {"convolution": "canonical"}),
    (mobilenet, {"norm": "batch", "head_bias": False}),
    (mlp, {}),
    (mlp, {"norm": "layer"}),
]


@pytest.mark.parametrize(
    ("transcription", "fields"),
    CASES,
    ids=lambda part: part.__name__ if callable(part) else "-".join(map(str, part.values())),
)
def test_inference_and_training_agree(tiny_of, transcription, fields):
    model, variables, images = tiny_of(transcription.__name__, **fields)

    @jax.jit
    def both(variables, images):
        trained, _ = model.module.apply(variables, images, train=True, mutable=["batch_stats"])
        return model.module.apply(variables, images, train=False), trained

    options = {name: fields[name] for name in ("stride_on", "pool") if name in fields}
    for train, logits in enumerate(both(variables, images)):
        twin = Twin(variables, model.module.norm, bool(train))
        with torch.no_grad():
            want = transcription(twin, torch.tensor(images.transpose(0, 3, 1, 2).copy()), **options)
        np.testing.assert_allclose(logits, want.numpy(), rtol=1e-4, atol=1e-4)
