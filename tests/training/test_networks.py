"""Every method on networks without BatchNorm and with concatenations, and the recomputation of activations."""

import functools

import numpy as np
import pytest
from programs import STRIPES, Trainer, assert_same, settings
from test_methods_all import OPTIONS

from seal_jax import methods, models, paths
from seal_jax.errors import UsageError
from seal_jax.models import densenet
from seal_jax.models.network import Entry

NETWORKS = {
    "vit": {"name": "vit_small_patch16", "patch": 4, "width": 8, "depth": 2},
    "densenet": {"name": "densenet_tiny", "width": None},
}


@pytest.fixture(autouse=True)
def tiny_densenet(monkeypatch):
    """A DenseNet of two dense blocks, by a name that the registry knows."""
    build = functools.partial(
        models.DenseNet, block_sizes=(2, 1), growth=2, bottleneck=2, width=4, stem="cifar"
    )
    monkeypatch.setitem(densenet.MODELS, "densenet_tiny", Entry(build))


def trained(network, name="normal", **train):
    """Two generations of one epoch; those of LW are the two blocks of each network."""
    options = {"name": name, **OPTIONS.get(name, {})}
    if name in ("seal", "llf"):
        options["threshold"] = "block2"
    train |= {"generations": 2, "epochs_per_generation": 1, "batch_size": 30}
    train |= {"pretrained": "given" if name == "pof" else ""}
    return Trainer(STRIPES, settings(options, model=NETWORKS[network], train=train)).run(2)


# What depends on the network's structure, its statistics or its features; all of them with a ViT.
ON_DENSENET = ("seal", "lw", "kels", "born_again", "pof", "fast")


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("vit", "seal"),
        *(
            pytest.param(network, name, marks=pytest.mark.slow)
            for network, names in (("vit", methods.NAMES), ("densenet", ON_DENSENET))
            for name in names
            if (network, name) not in {("vit", "seal"), ("vit", "kels")}
        ),
    ],
)
def test_methods_train_every_kind_of_network(network, name):
    trainer = trained(network, name)
    assert np.isfinite(trainer.losses).all()
    assert int(trainer.state.step[0]) == trainer.experiment.total_steps == 6
    if name == "seal":
        # What the event left negated is the first block and what is below it, by the declared order.
        mask = trainer.experiment.method.mask
        forgets = {path.split("/")[0] for path, flag in paths.named_leaves(mask) if flag}
        assert forgets == {"patch_embed", "cls_token", "pos_embed", "block1"} or network != "vit"


def test_kels_needs_a_slim_form():
    with pytest.raises(UsageError, match=r"a ViT has no slim form, which KELS needs"):
        trained("vit", "kels")


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_checkpointing_changes_rounding_alone(network):
    plain, checkpointed = (trained(network, remat=remat) for remat in (False, True))
    assert_same(plain.state.weights, checkpointed.state.weights, rtol=1e-3, atol=1e-4)
