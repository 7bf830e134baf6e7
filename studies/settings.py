"""Networks, data and conditions that several studies share."""

from __future__ import annotations

MLP = {"model.name": "mlp", "model.width": 128, "model.depth": 3}
RESNET8 = {"model.name": "resnet8", "model.width": 8}
MLP_ON_DIGITS = {"data.name": "digits", **MLP}
MLP_ON_FASHION = {
    "data.name": "fashion_mnist",
    "data.train_count": 200,
    "data.validation_fraction": 0.02,
    "data.test_split": "test[:20%]",
    **MLP,
}
LABEL_NOISE = {
    "clean": {},
    "noise20": {"data.label_noise": 0.2},
    "noise40": {"data.label_noise": 0.4},
    "noise60": {"data.label_noise": 0.6},
}
NAMES = {
    "mlp_digits": "MLP on digits",
    "mlp_fashion": "MLP on 2,000 images of Fashion-MNIST",
    "resnet8_digits": "ResNet-8 of width 8 on digits",
    "clean": "right labels",
    "noise20": "20 % wrong",
    "noise40": "40 % wrong",
    "noise60": "60 % wrong",
}
