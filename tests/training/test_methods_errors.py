"""Hyper-parameters that make no sense, each with one line that names the field."""

import types

import jax
import numpy as np
import pytest
from programs import SHAPE, STRIPES, mlp
from trainer_runs import ROOT

from seal_jax import data
from seal_jax.cli import configs
from seal_jax.core import mesh as meshes
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments


def test_the_forgetting_frequencies_of_seal_build_on_all_of_tiny_imagenet():
    """Table 11: a quarter of 70 or 90 epochs of 3125 steps is half a step off whole."""
    for variant, ascent in (("E70", "54,688 of the 218,750"), ("E90", "70,313 of the 281,250")):
        config = configs.load(f"{ROOT}/configs/seal_frequency.py:{variant}")
        shape = experiments.DataShape(100_000, 0, 10_000, (64, 64, 3), 200)
        built = experiments.build(config, shape, meshes.make(config, jax.devices()[:1]))
        assert f"ascent: the first {ascent} steps" in built.summary()


GIVEN = {"pretrained": "given"}
CASES = [
    # method, its options, other sections, the field
    ("sam", {"rho": -0.1}, {}, "method.rho"),
    ("sam", {"rho": float("nan")}, {}, "method.rho"),
    ("sam", {"rho": float("inf")}, {}, "method.rho"),
    ("sam", {"eta": -1.0}, {}, "method.eta"),
    ("sam", {"sharpness": "each"}, {}, "method.sharpness"),
    ("sa_gd", {"temperature": 0.0}, {}, "method.temperature"),
    ("sa_gd", {"temperature": float("inf")}, {}, "method.temperature"),
    ("sa_gd", {"q": -1.0}, {}, "method.q"),
    ("sa_gd", {"epsilon": 0.0}, {}, "method.epsilon"),
    ("sa_gd", {"ascent_cap": 1.5}, {}, "method.ascent_cap"),
    ("l2_init", {}, {"optimizer": {"name": "adamw"}}, "optimizer.name"),
    ("hare_tortoise", {"decay": 1.0}, {}, "method.decay"),
    ("hare_tortoise", {"every_epochs": 0}, {}, "method.every_epochs"),
    ("hare_tortoise", {}, {"optimizer": {"ema": 0.9}}, "optimizer.ema"),
    ("wels", {"fraction": 0.0}, {}, "method.fraction"),
    ("wels", {"fraction": 1.0}, {}, "method.fraction"),
    ("wels", {"rate": 0.2}, {}, "method.rate"),
    ("wels", {}, {"optimizer": {"schedule": "single"}}, "optimizer.schedule"),
    ("kels", {"keep": 1.2}, {}, "method.keep"),
    ("kels", {"rate": 0.8}, {}, "method.rate"),
    ("dsd", {"fraction": 1.0}, {}, "method.fraction"),
    ("dsd", {"fraction": float("nan")}, {}, "method.fraction"),
    ("dsd", {"scope": "layer"}, {}, "method.scope"),
    ("fc", {"threshold": "dense3"}, {}, "method.threshold"),
    ("fc", {"threshold": "dense1"}, {}, "method.threshold"),
    ("llf", {"threshold": "layer3"}, {}, "method.threshold"),
    (
        "llf",
        {"threshold": "dense2", "optimizer_state": "zero"},
        {"optimizer": {"reset_momentum": "never"}},
        "method.optimizer_state",
    ),
    ("imp", {"fraction": 0.0}, {}, "method.fraction"),
    ("imp", {"fraction": 1e-9}, {}, "method.fraction"),
    ("imp", {"rewind_step": 20}, {}, "method.rewind_step"),
    ("imp", {"rewind_step": -1}, {}, "method.rewind_step"),
    ("redo", {"threshold": -0.1}, {}, "method.threshold"),
    ("redo", {"every": 0}, {}, "method.every"),
    ("redo", {}, {"optimizer": {"plateau_epochs": 2}}, "optimizer.plateau_epochs"),
    ("continual_backprop", {"replacement_rate": 2.0}, {}, "method.replacement_rate"),
    ("continual_backprop", {"decay": 1.0}, {}, "method.decay"),
    ("continual_backprop", {"maturity": -1}, {}, "method.maturity"),
    ("lw", {"rounds": 0}, {}, "method.rounds"),
    ("lw", {"blocks": 3}, {}, "method.blocks"),
    ("lw", {"blocks": -1}, {}, "method.blocks"),
    ("lw", {"sample_size": -1}, {"train": {"generations": 2}}, "method.sample_size"),
    ("lw", {"epsilon": -1.0}, {"train": {"generations": 2}}, "method.epsilon"),
    ("lw", {}, {}, "train.generations"),
    ("lw", {"rounds": 2}, {"train": {"generations": 2}}, "train.generations"),
    ("lw", {"sample_size": 91}, {"train": {"generations": 2}}, "method.sample_size"),
    ("pof", {}, {}, "train.pretrained"),
    ("pof", {"weak_batch_size": 0}, {"train": GIVEN}, "method.weak_batch_size"),
    ("pof", {"weak_batch_size": 91}, {"train": GIVEN}, "method.weak_batch_size"),
    ("pof", {"weak_batch_size": 31, "resample": 2}, {"train": GIVEN}, "method.weak_batch_size"),
    ("pof", {"resample": -1}, {"train": GIVEN}, "method.resample"),
    ("pof", {"gamma": "normal"}, {"train": GIVEN}, "method.gamma"),
    ("pof", {"gamma_low": -1.0}, {"train": GIVEN}, "method.gamma_low"),
    ("pof", {"gamma_low": 1.0, "gamma_high": 0.5}, {"train": GIVEN}, "method.gamma_high"),
    ("pof", {"gamma_high": float("nan")}, {"train": GIVEN}, "method.gamma_high"),
    ("pof", {"gamma_high": float("inf")}, {"train": GIVEN}, "method.gamma_high"),
    (
        "pof",
        {"classifier_learning_rate": -1.0},
        {"train": GIVEN},
        "method.classifier_learning_rate",
    ),
    ("pof", {}, {"train": GIVEN, "optimizer": {"name": "adam"}}, "optimizer.name"),
    ("foca", {"weak_batch_size": 0}, {}, "method.weak_batch_size"),
    ("foca", {"weak_batch_size": 91}, {}, "method.weak_batch_size"),
    ("foca", {"weak_steps": 0}, {}, "method.weak_steps"),
    ("foca", {"weak_learning_rate": 0.0}, {}, "method.weak_learning_rate"),
    ("foca", {"weak_sigma": float("nan")}, {}, "method.weak_sigma"),
    ("foca", {"weak_sigma": float("inf")}, {}, "method.weak_sigma"),
    ("fast", {"head": "one"}, {}, "method.head"),
    ("fast", {"head": "normal"}, {}, "method.head"),
    ("fast", {"sigma": 0.1}, {}, "method.sigma"),
    ("fast", {"head": "normal", "sigma": 0.0}, {}, "method.sigma"),
    ("fast", {"alpha": 0.0, "beta": 0.0}, {}, "method.alpha"),
    ("fast", {"alpha": -0.1}, {}, "method.alpha"),
    ("fast", {"beta": float("nan")}, {}, "method.beta"),
    ("fast", {"warmup": True, "warmup_gain": 1.0}, {}, "method.warmup_gain"),
    ("fast", {"warmup": True, "warmup_steps": 0}, {}, "method.warmup_steps"),
    ("born_again", {"temperature": 0.0}, {}, "method.temperature"),
    ("born_again", {"temperature": float("inf")}, {}, "method.temperature"),
    ("born_again", {"weight": 2.0}, {}, "method.weight"),
    ("born_again", {"tolerance": -0.1}, {}, "method.tolerance"),
    ("born_again", {"tolerance": 1.5, "tolerant_classes": 3}, {}, "method.tolerance"),
    ("born_again", {"tolerance": 0.1, "tolerant_classes": 5}, {}, "method.tolerant_classes"),
    ("born_again", {"tolerance": 0.1, "tolerant_classes": 1}, {}, "method.tolerant_classes"),
    ("seal", {"threshold": "dense2", "ascent_epochs": 5.0}, {}, "ascent_epochs"),
    ("seal", {"threshold": "dense2", "ascent_epochs": 0.5}, {}, "ascent_epochs"),
    ("seal", {"threshold": "layer3"}, {}, "method.threshold"),
    ("normal", {"rho": 0.1}, {}, "method.rho"),
    ("normal", {}, {"train": {"validate_every": 2}}, "train.validate_every"),
    ("normal", {}, {"train": {"sampling": "balanced", "batch_size": 18}}, "train.batch_size"),
    ("normal", {}, {"train": {"sampling": "equal"}}, "train.sampling"),
    ("normal", {}, {"train": {"until_accuracy": 1.5}}, "train.until_accuracy"),
    ("normal", {}, {"train": {"patience": -1}}, "train.patience"),
    ("normal", {}, {"optimizer": {"plateau_factor": 1.0}}, "optimizer.plateau_factor"),
    ("normal", {}, {"train": {"sampling": "balanced", "drop_last": False}}, "train.drop_last"),
    ("normal", {}, {"optimizer": {"schedule": "steps"}}, "optimizer.decay_epochs"),
    (
        "normal",
        {},
        {"optimizer": {"schedule": "steps", "decay_epochs": "2", "decay_factor": 2.0}},
        "optimizer.decay_factor",
    ),
    (
        "normal",
        {},
        {"optimizer": {"schedule": "constant", "learning_rate": -0.1}},
        "optimizer.learning_rate",
    ),
    (
        "normal",
        {},
        {"optimizer": {"schedule": "constant", "learning_rate": float("nan")}},
        "optimizer.learning_rate",
    ),
    (
        "sam",
        {"sharpness": "device", "decay_in_perturbation": True},
        {},
        "method.decay_in_perturbation",
    ),
    ("imp", {"rewind_step": 2}, {"train": {"patience": 1}}, "method.rewind_step"),
    ("fast", {"warmup": True, "alpha": 0.0}, {}, "method.warmup"),
    (
        "fast",
        {"warmup": True, "warmup_statistics": True},
        {"train": {"batch_statistics": "frozen"}},
        "method.warmup_statistics",
    ),
    ("normal", {}, {"train": {"batch_statistics": "layer"}}, "train.batch_statistics"),
    ("normal", {}, {"data": {"label_noise": 1.0}}, "data.label_noise"),
    ("normal", {}, {"data": {"label_noise": 0.1, "label_file": "x"}}, "data.label_noise"),
    ("normal", {}, {"data": {"label_noise_seed": -1}}, "data.label_noise_seed"),
    ("normal", {}, {"data": {"train_count": -1}}, "data.train_count"),
    ("normal", {}, {"data": {"imbalance": 0.5}}, "data.imbalance"),
    ("normal", {}, {"data": {"imbalance": float("inf")}}, "data.imbalance"),
    ("normal", {}, {"data": {"warm_share": 1.0}}, "data.warm_share"),
    ("normal", {}, {"data": {"warm_share": 0.001, "warm_generations": 1}}, "data.warm_share"),
    ("normal", {}, {"data": {"warm_generations": 4}}, "data.warm_generations"),
    (
        "normal",
        {},
        {"train": {"tuned_on": "runs/grid", "vary": '{"optimizer.learning_rate": [0.1]}'}},
        "train.tuned_on",
    ),
    (
        "normal",
        {},
        {"data": {"warm_generations": 1}, "train": {"sampling": "balanced"}},
        "data.warm_generations",
    ),
    ("normal", {}, {"data": {"mixup": -0.1}}, "data.mixup"),
    ("normal", {}, {"data": {"cutmix": float("nan")}}, "data.cutmix"),
    ("normal", {}, {"data": {"cutmix": 1.0}, "train": {"sampling": "balanced"}}, "data.cutmix"),
    ("normal", {}, {"data": {"mixup": 0.2}, "train": {"batch_size": 15}}, "train.batch_size"),
    ("normal", {}, {"data": {"randaugment": -1}}, "data.randaugment"),
    ("normal", {}, {"data": {"randaugment_magnitude": 11.0}}, "data.randaugment_magnitude"),
    ("foca", {}, {"data": {"warm_share": 0.3, "warm_generations": 1}}, "method.weak_batch_size"),
    ("fast", {"warmup": True, "beta": 0.0}, {}, "method.warmup"),
    ("normal", {}, {"optimizer": {"accumulate": 3}}, "optimizer.accumulate"),
    ("seal", {"threshold": "dense2"}, {"optimizer": {"name": "prodigy"}}, "optimizer.name"),
    (
        "seal",
        {"threshold": "dense2", "ascent_weight_decay_factor": 0.0},
        {"optimizer": {"name": "lamb"}},
        "method.ascent_weight_decay_factor",
    ),
    ("sa_gd", {}, {"optimizer": {"name": "madgrad"}}, "optimizer.name"),
    ("pof", {}, {"train": GIVEN, "optimizer": {"name": "adamw"}}, "optimizer.name"),
    (
        "sam",
        {"decay_in_perturbation": True},
        {"optimizer": {"name": "adamw"}},
        "method.decay_in_perturbation",
    ),
    ("lw", {"epsilon": float("inf")}, {"train": {"generations": 2}}, "method.epsilon"),
]
NEED_VALIDATION = [
    ({}, {"train": {"patience": 2}}, "train.patience"),
    ({}, {"optimizer": {"plateau_epochs": 2}}, "optimizer.plateau_epochs"),
    ({}, {"train": {"validate_every": 1}}, "train.validate_every"),
    ({"name": "fast", "warmup": True}, {}, "method.warmup"),
]


def test_a_class_without_images_cannot_be_balanced():
    images, labels = np.zeros((12, 8, 8, 1), np.uint8), np.arange(12, dtype=np.int32) % 3
    split = (images[:9], labels[:9])
    dataset = data.from_arrays(split, split, split, num_classes=4)
    config = mlp({"name": "normal"}, train={"sampling": "balanced"})
    with pytest.raises(UsageError, match=r"data\.train_split = 'train' has no image of class 3"):
        experiments.check_data(config, dataset)


def test_images_that_do_not_fit_a_device(monkeypatch):
    """120 images of 8x8, each in a row of 128 bytes."""

    def devices_of(size):
        device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": size})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    config = mlp({"name": "normal"})
    devices_of(120 * 128)
    experiments.check_data(config, STRIPES)
    devices_of(120 * 128 - 1)
    with pytest.raises(UsageError, match=r"data\.placement: all images take 15,360 bytes of each"):
        experiments.check_data(config, STRIPES)


def prepare(method, sections, shape):
    """What happens before a run writes its first file."""
    config = mlp(method, **sections)
    experiment = experiments.build(config, shape, meshes.make(config, jax.devices()[:1]))
    experiment.abstract_state(1)


def refused(field, method, sections, shape):
    with pytest.raises(UsageError) as caught:
        prepare(method, sections, shape)
    message = str(caught.value)
    assert message.startswith((f"{field} ", f"{field}:")), message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "options", "sections", "field"), CASES)
def test_bad_hyper_parameters_are_named(name, options, sections, field):
    refused(field, {"name": name, **options}, sections, SHAPE)


@pytest.mark.parametrize(("method", "sections", "field"), NEED_VALIDATION)
def test_rules_that_look_at_validation_need_a_split(method, sections, field):
    refused(field, method or None, sections, SHAPE._replace(validation=0))
