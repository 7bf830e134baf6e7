"""The networks against PyTorch with torchvision's layout, weights copied over (needs torch)."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn


class Block(nn.Module):
    def __init__(self, kind, shortcut, inplanes, planes, stride):
        super().__init__()
        out = planes * (4 if kind == "bottleneck" else 1)
        if kind == "bottleneck":
            plan = [(inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)]
        else:
            plan = [(inplanes, planes, 3, stride), (planes, planes, 3, 1)]
        self.depth, self.stride, self.extra = len(plan), stride, out - inplanes
        for index, (fan, to, size, step) in enumerate(plan, start=1):
            conv = nn.Conv2d(fan, to, size, step, padding=size // 2, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(to))
        self.zero_pad = shortcut == "A"
        self.downsample = None
        if not self.zero_pad and (stride != 1 or inplanes != out):
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        y = x
        for index in range(1, self.depth + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            if index < self.depth:
                y = y.relu()
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.zero_pad:
            x = nn.functional.avg_pool2d(x, 1, self.stride)
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))
        return (x + y).relu()


class TorchResNet(nn.Module):
    """Two stages of two and one blocks, width 4, as the fixture has them."""

    def __init__(self, kind, stem, shortcut):
        super().__init__()
        wide = 4 if kind == "bottleneck" else 1
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, 4, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        first = Block(kind, shortcut, 4, 4, 1)
        self.layer1 = nn.Sequential(first, Block(kind, shortcut, 4 * wide, 4, 1))
        self.layer2 = nn.Sequential(Block(kind, shortcut, 4 * wide, 8, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * wide, 3)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer2(self.layer1(x))
        return self.fc(self.avgpool(x).flatten(1))


LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_name(path):
    path = path.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    *parents, leaf = path.replace("/block", ".").replace("/", ".").split(".")
    return ".".join([*parents, LEAVES.get(leaf, leaf)])


def torch_twin(tiny):
    net = TorchResNet(tiny.block, tiny.stem, tiny.shortcut)
    state = {}
    for path, value in {**tiny.params, **tiny.stats}.items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        state[torch_name(path)] = torch.tensor(np.transpose(value, axes).copy())
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return net, torch.tensor(np.transpose(tiny.images, (0, 3, 1, 2)).copy())


def test_inference_agrees(tiny):
    net, images = torch_twin(tiny)
    with torch.no_grad():
        want = net.eval()(images).numpy()
    np.testing.assert_allclose(tiny.inferred, want, rtol=1e-4, atol=1e-4)


def test_training_and_the_running_statistics_agree(tiny):
    net, images = torch_twin(tiny)
    counts = {}  # values a channel that each BatchNorm saw
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _, ins, out, name=name: counts.update({name: out.numel() // out.shape[1]})
            )
    with torch.no_grad():
        want = net.train()(images).numpy()
    np.testing.assert_allclose(tiny.trained, want, rtol=1e-4, atol=1e-4)
    state = net.state_dict()
    for path, new in tiny.new_stats.items():
        name = torch_name(path)
        if path.endswith("/var"):
            # torch takes in the unbiased variance, Flax the biased one.
            count = counts[name.removesuffix(".running_var")]
            old = 0.9 * tiny.stats[path]
            new = old + (new - old) * count / (count - 1)
        np.testing.assert_allclose(new, state[name].numpy(), 1e-4, 1e-4, err_msg=path)
