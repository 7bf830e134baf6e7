"""Losses of self-distillation against PyTorch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seal_jax import UsageError
from seal_jax.losses import born_again, tolerant

B, N = 6, 5
RNG = np.random.default_rng(0)
LOGITS, TEACHER = (3 * RNG.normal(size=(2, B, N))).astype(np.float32)
LABELS = RNG.integers(0, N, B)
WEIGHTS = np.linspace(1.0, 2.0, B)  # of the examples, so that the gradients tell them apart


def torch_born_again(torch, z, weight, temperature, smoothing):
    F = torch.nn.functional
    plain = F.cross_entropy(z, torch.tensor(LABELS), reduction="none", label_smoothing=smoothing)
    divergence = F.kl_div(
        F.log_softmax(z / temperature, 1),
        F.softmax(torch.tensor(TEACHER, dtype=torch.float64) / temperature, 1),
        reduction="none",
    ).sum(1)
    return (1 - weight) * plain + weight * temperature**2 * divergence


def torch_tolerant(torch, z, weight, k, smoothing):
    F = torch.nn.functional
    plain = F.cross_entropy(z, torch.tensor(LABELS), reduction="none", label_smoothing=smoothing)
    scores = torch.sort(F.softmax(z, 1), dim=1, descending=True).values
    return plain + weight * (scores[:, 0] - scores[:, 1:k].mean(1))


def check(loss, oracle):
    torch = pytest.importorskip("torch")
    z = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    expected = oracle(torch, z)
    (expected * torch.tensor(WEIGHTS)).sum().backward()
    np.testing.assert_allclose(loss(LOGITS), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda z: (loss(z) * WEIGHTS.astype(np.float32)).sum())(LOGITS)
    np.testing.assert_allclose(gradient, z.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_born_again_equals_torch(weight, temperature, smoothing):
    options = {"weight": weight, "temperature": temperature, "label_smoothing": smoothing}
    check(
        lambda z: born_again(z, TEACHER, LABELS, **options),
        lambda torch, z: torch_born_again(torch, z, weight, temperature, smoothing),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("k", [2, 3, N])
@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_tolerant_equals_torch(weight, k, smoothing):
    check(
        lambda z: tolerant(z, LABELS, weight=weight, k=k, label_smoothing=smoothing),
        lambda torch, z: torch_tolerant(torch, z, weight, k, smoothing),
    )


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("weight", ["static", "array", "traced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weight_0_is_the_cross_entropy_bit_for_bit(weight, smoothing):
    extreme = np.float32(TEACHER * [1, 1e2, 1e4, 1e8, 1e30])  # finite, however far apart

    def losses(z, labels, weight):
        options = {"weight": weight, "label_smoothing": smoothing}
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, N), smoothing)
        return (
            optax.softmax_cross_entropy(z, smooth),
            born_again(z, extreme, labels, temperature=3.0, **options),
            tolerant(z, labels, k=3, **options),
        )

    if weight == "static":
        plain, *found = jax.jit(lambda z, y: losses(z, y, 0.0))(LOGITS, LABELS)
    elif weight == "array":
        plain, *found = losses(LOGITS, LABELS, jnp.float32(0.0))
    else:  # in one program: another one rounds the cross entropy otherwise
        plain, *found = jax.jit(losses)(LOGITS, LABELS, 0.0)
    for loss in found:
        np.testing.assert_array_equal(bits(loss), bits(plain))


def test_weight_0_needs_no_teacher():
    def loss(weight):
        return jax.jit(
            lambda z, teacher: born_again(z, teacher, LABELS, weight=weight, temperature=2.0)
        )

    plain = jax.jit(lambda z: optax.softmax_cross_entropy(z, jax.nn.one_hot(LABELS, N)))
    flops = [
        f.lower(*arguments).compile().cost_analysis()["flops"]
        for f, arguments in (
            (plain, (LOGITS,)),
            (loss(0.0), (LOGITS, TEACHER)),
            (loss(0.5), (LOGITS, TEACHER)),
        )
    ]
    assert flops[1] < 1.2 * flops[0] < flops[2]


def test_the_teacher_gets_no_gradient():
    gradient = jax.grad(
        lambda teacher: born_again(LOGITS, teacher, LABELS, weight=0.7, temperature=2.0).sum()
    )(TEACHER)
    assert (gradient == 0).all()


def test_a_perfect_student_has_no_distance():
    loss = born_again(TEACHER, TEACHER, LABELS, weight=1.0, temperature=2.0)
    np.testing.assert_allclose(loss, np.zeros(B), atol=1e-6)


def test_low_precision_and_other_shapes():
    """Sequences and vmapped seeds; the sums are made in float32."""
    half = [jnp.asarray(x, jnp.bfloat16) for x in (LOGITS, TEACHER)]
    options = {"weight": 0.5, "temperature": 2.0}
    loss = born_again(*half, LABELS, **options)
    full = born_again(*(np.asarray(x, np.float32) for x in half), LABELS, **options)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, full)
    folded = [x.reshape(2, 3, N) for x in (LOGITS, TEACHER)]
    together = born_again(*folded, LABELS.reshape(2, 3), **options)
    apart = jax.vmap(lambda *x: born_again(*x, **options))(*folded, LABELS.reshape(2, 3))
    expected = born_again(LOGITS, TEACHER, LABELS, **options).reshape(2, 3)
    np.testing.assert_allclose(together, expected, rtol=1e-6)
    np.testing.assert_allclose(apart, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0 must be positive"),
        ({"temperature": -2.0}, "temperature = -2 must be positive"),
        ({"temperature": float("nan")}, "temperature = nan must be positive"),
        ({"weight": 1.5}, r"weight = 1.5 must lie in \[0, 1\]"),
        ({"weight": -0.1}, r"weight = -0.1 must lie in \[0, 1\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing = 1 must lie in \[0, 1\)"),
        ({"teacher_logits": TEACHER[:, :-1]}, r"teacher_logits has shape \(6, 4\)"),
        ({"labels": LABELS[:-1]}, r"labels has shape \(5,\); it must be \(6,\)"),
    ],
)
def test_born_again_refuses(options, message):
    arguments = {"teacher_logits": TEACHER, "labels": LABELS, "weight": 0.5, "temperature": 1.0}
    with pytest.raises(UsageError, match=message):
        born_again(LOGITS, **{**arguments, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k = 1 must be a whole number from 2 to the 5 classes"),
        ({"k": 6}, "k = 6 must be"),
        ({"k": 2.5}, "k = 2.5 must be"),
        ({"weight": 2.0}, "weight = 2 must lie in"),
        ({"labels": LABELS[:, None]}, r"labels has shape \(6, 1\)"),
    ],
)
def test_tolerant_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        tolerant(LOGITS, **{"labels": LABELS, "weight": 0.5, "k": 3, **options})
