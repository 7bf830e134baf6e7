"""Linear+Affines against the protocol written out in PyTorch, and against the frozen network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, models
from seal_jax.core import mesh as meshes
from seal_jax.evaluation import affines, few_shot
from seal_jax.evaluation.affines import Protocol, linear_affines
from seal_jax.evaluation.few_shot import EPISODES

# 9 images in batches of 4: the last has one.
PROTOCOL = Protocol(
    ways=3,
    shots=3,
    queries=5,
    epochs=3,
    learning_rate=0.1,
    weight_decay=0.02,
    affine_learning_rate=0.2,
)


def normalise(images):
    return images.astype(jnp.float32) / 100 - 1


def network(**fields):
    """A stem and one residual block: three BatchNorm layers, their numbers away from 0 and 1."""
    module = models.ResNet(num_classes=4, stage_sizes=(1,), width=4, stem="cifar", **fields)
    model = models.from_module(module, name="tiny", image_shape=(6, 5, 3))
    random = np.random.default_rng(1)

    def away(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return random.normal(scale=0.4, size=leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree_util.tree_map_with_path(away, shapes)


@pytest.fixture(scope="module")
def images():
    """Five classes of noisy images."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 5
    centres = random.integers(0, 256, (5, 6, 5, 3))
    noise = random.integers(0, 256, (60, 6, 5, 3))
    return (0.3 * centres[labels] + 0.7 * noise).astype(np.uint8), labels


def run(model, variables, pixels, labels, protocol, **options):
    """Two episodes at a time on one device: most tests share the program."""
    options = {"seed": 2, "devices": jax.devices()[:1], "together": 2, "keep": True} | options
    return linear_affines(model, variables, pixels, labels, normalise, protocol, **options)


def in_torch(torch, variables, support, query, drawn, protocol):
    """Return accuracy, affine parameters and running statistics of one episode."""
    functional = torch.nn.functional
    params, stats = variables["params"], variables["batch_stats"]

    def tensor(array):
        return torch.tensor(np.asarray(array), dtype=torch.float64)

    def at(tree, path):
        for name in path.split("/"):
            tree = tree[name]
        return tree

    paths = ["bn1", "layer1/block0/bn1", "layer1/block0/bn2"]
    trained = {
        f"{path}/{name}": tensor(at(params, path)[name]).requires_grad_()
        for path in paths
        for name in ("scale", "bias")
    }
    running = {f"{path}/{n}": tensor(at(stats, path)[n]) for path in paths for n in ("mean", "var")}

    def convolve(x, path):
        kernel = tensor(at(params, path)["kernel"]).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, padding=1)

    def normalised(x, path, learning):
        """As BatchNorm2d does, its unbiased running variance included."""
        statistics = [running[f"{path}/{name}"] for name in ("mean", "var")]
        if protocol.statistics == "batch_only":
            statistics = [value.clone() for value in statistics]
        by_batch = learning and protocol.statistics != "running"
        affine = [trained[f"{path}/{name}"] for name in ("scale", "bias")]
        return functional.batch_norm(x, *statistics, *affine, by_batch, momentum=0.1, eps=1e-5)

    def features(images, learning):
        x = (tensor(images) / 100 - 1).permute(0, 3, 1, 2)
        x = normalised(convolve(x, "conv1"), "bn1", learning).relu()
        block = "layer1/block0"
        y = normalised(convolve(x, f"{block}/conv1"), f"{block}/bn1", learning).relu()
        y = normalised(convolve(y, f"{block}/conv2"), f"{block}/bn2", learning)
        return (x + y).relu().mean((2, 3))

    head = torch.nn.Linear(4, protocol.ways).double()
    with torch.no_grad():
        head.weight.copy_(tensor(drawn.kernel))
        head.bias.copy_(tensor(drawn.bias))
    optimizers = [
        torch.optim.SGD(
            head.parameters(),
            lr=protocol.learning_rate,
            momentum=0.9,
            dampening=0.9,
            weight_decay=protocol.weight_decay,
        ),
        torch.optim.SGD(trained.values(), lr=protocol.affine_learning_rate),
    ]
    labels = torch.arange(protocol.ways).repeat_interleave(protocol.shots)
    for order in drawn.orders:
        # Batches of 4, but the ninth image is not alone.
        batches = [order[:4], order[4:8], order[8:]]
        if protocol.statistics != "running":
            batches = [order[:4], order[4:]]
        for rows in batches:
            for optimizer in optimizers:
                optimizer.zero_grad()
            scores = head(features(support[rows], True))
            functional.cross_entropy(scores, labels[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
    predicted = head(features(query, False)).argmax(1).numpy()
    accuracy = (predicted == np.repeat(np.arange(protocol.ways), protocol.queries)).mean()
    return accuracy, trained, running


@pytest.mark.parametrize(
    "statistics",
    [
        "batch",
        "batch_only",
        pytest.param("running", marks=pytest.mark.slow),
    ],
)
def test_every_episode_is_that_of_torch(images, statistics):
    torch = pytest.importorskip("torch")
    pixels, labels = images
    model, variables = network()
    protocol = dataclasses.replace(PROTOCOL, statistics=statistics)
    ours = run(model, variables, pixels, labels, protocol, episodes=3)
    assert ours.scores.accuracies.shape == (3,)
    assert not ours.diverged.any()
    for number in range(3):
        drawn = few_shot.draw(few_shot.check(labels, protocol), 4, protocol, seed=2, number=number)
        accuracy, trained, running = in_torch(
            torch, variables, pixels[drawn.support], pixels[drawn.query], drawn, protocol
        )
        assert ours.scores.accuracies[number] == pytest.approx(accuracy, abs=1e-6)
        for expected, tree in ((trained, ours.affines), (running, ours.batch_stats)):
            for path, value in expected.items():
                leaf = tree
                for name in path.split("/"):
                    leaf = leaf[name]
                found = value.detach().numpy()
                np.testing.assert_allclose(leaf[number], found, atol=2e-4, err_msg=path)
    assert set(ours.affines) == {"bn1", "layer1"}
    moved = ours.affines["bn1"]["scale"] - variables["params"]["bn1"]["scale"]
    assert np.abs(moved).max() > 1e-2


def test_without_training_the_affine_parameters_it_is_the_linear_classifier(images):
    """On all devices, with dropout in the network: neither shows."""
    pixels, labels = images
    model, variables = network(dropout=0.5)
    still = Protocol(ways=3, shots=3, queries=5, statistics="running", affine_learning_rate=0)
    ours = linear_affines(
        model, variables, pixels, labels, normalise, still, episodes=10, together=1
    )
    features = np.asarray(model.features(variables, normalise(jnp.asarray(pixels)))["features"])
    alone = few_shot.linear(features, labels, still, episodes=10)
    np.testing.assert_allclose(ours.scores.accuracies, alone.accuracies, atol=1e-6)
    assert len(set(alone.accuracies.tolist())) > 2
    assert ours.affines is None


def test_an_evaluation_can_be_taken_up(images):
    network_and_data = (*network(), *images)
    whole = run(*network_and_data, PROTOCOL, episodes=5)
    rest = run(*network_and_data, PROTOCOL, episodes=2, first=3)
    np.testing.assert_array_equal(whole.scores.accuracies[3:], rest.scores.accuracies)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {"width": 4}),
        ("wrn10-1", {}),
        ("vgg16", {"norm": "batch", "dense_width": 8}),
        ("mobilenet", {"norm": "batch"}),
        ("scnn", {"norm": "batch", "dense_width": 8}),
        ("mlp", {"norm": "batch"}),
    ],
)
def test_every_network_with_batch_norm_has_a_program(name, options):
    """Traced only: all scales and biases of its BatchNorm layers are trained, and nothing else."""
    model = models.create(name, num_classes=4, image_shape=(32, 32, 3), **options)
    mesh = meshes.along(EPISODES, jax.devices()[:1])
    spec = affines.Spec(model, normalise, PROTOCOL, mesh, True)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    size, _ = affines.sizes(spec, variables)
    drawn = few_shot.draw(
        few_shot.check(np.repeat(np.arange(3), 8), PROTOCOL), size, PROTOCOL, seed=0, number=0
    )
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (2, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)
        ),
        drawn,
    )
    pixels = jax.ShapeDtypeStruct((2, 24, 32 * 32 * 3), np.uint8)
    right, _, _, (trained, statistics) = jax.eval_shape(
        lambda *arrays: affines.tune(*arrays, spec), variables, pixels, batch
    )
    assert right.shape == (2,)
    count = len(jax.tree.leaves(variables["batch_stats"]))
    assert count >= 4
    assert len(jax.tree.leaves(trained)) == count == len(jax.tree.leaves(statistics))


def test_batches():
    """A last batch of one joins the one before, whatever their number; others stay."""
    assert affines.cut(Protocol(shots=5)) == (5, 5)
    assert affines.cut(Protocol(shots=1)) == (0, 5)
    assert affines.cut(Protocol(shots=20)) == (25, 0)
    assert affines.cut(Protocol(shots=50)) == (62, 2)
    assert affines.cut(Protocol(shots=5, statistics="running")) == (6, 1)


def test_more_memory_holds_more_episodes():
    model, variables = network()
    mesh = meshes.along(EPISODES, jax.devices()[:1])

    def needed(protocol):
        spec = affines.Spec(model, normalise, protocol, mesh, False)
        return affines.sizes(spec, variables)

    width, small = needed(Protocol(ways=3, shots=4, queries=5, batch_size=4))
    _, large = needed(Protocol(ways=3, shots=4, queries=5, batch_size=6))
    assert width == 4
    # Forward: three convolutions and norms of 6 x 5 x 4 floats an image, and some more of each norm.
    assert 2 * 4 * (6 * 30 * 4) * 4 < small < 2 * 4 * (60 * 30 * 4) * 4
    assert large == pytest.approx(1.5 * small, rel=0.1)


def test_bad_input(images):
    pixels, labels = images
    model, variables = network()
    normless, normless_variables = network(norm="layer")
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables)
    for arguments, message in [
        ((normless, normless_variables, pixels, labels), "'tiny' has no BatchNorm whose scales"),
        ((model, variables, pixels / 255, labels), r"must be uint8 \[n, height"),
        ((model, variables, pixels, labels[1:]), r"must be uint8 \[n, height"),
        ((model, variables, pixels[..., :1], labels), "made for images of 6x5x3 and cannot take"),
        ((model, broken, pixels, labels), "features hold NaN"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            run(*arguments, PROTOCOL, episodes=2)
        assert "\n" not in str(caught.value)
    for fields, message in [
        ({"statistics": "sample"}, "statistics = 'sample' must be one of batch, batch_only"),
        ({"batch_size": 1}, "batch_size = 1 leaves no statistics"),
        ({"affine_learning_rate": -1}, "affine_learning_rate = -1 must not be negative"),
        ({"momentum": 2}, r"momentum = 2 must lie in \[0, 1\)"),
    ]:
        with pytest.raises(UsageError, match=message):
            Protocol(**fields)


def test_an_episode_that_diverges_says_so(images):
    pixels, labels = images
    model, variables = network()
    # Features that are finite at first, but their steps are not.
    block = variables["params"]["layer1"]["block0"]
    block["bn2"]["scale"] = block["bn2"]["scale"] * np.float32(1e25)
    ours = run(model, variables, pixels, labels, PROTOCOL, episodes=2)
    assert ours.diverged.all()
    assert ours.scores.accuracies == pytest.approx(1 / 3)
