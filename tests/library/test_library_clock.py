"""The clock against a simulation that counts, and the cosine against its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax import Clock, UsageError, cosine
from seal_jax.schedules import steps


def simulate(steps, epochs, ascent_steps, generations):
    """Count batches in epochs in generations; return one row of answers per step."""
    rows = []
    epoch_now = 0
    for generation in range(generations):
        done = 0
        for epoch in range(epochs):
            for _batch in range(steps):
                later = generation > 0
                rows.append(
                    {
                        "epoch": epoch_now,
                        "generation": generation,
                        "step_in_generation": done,
                        "epoch_in_generation": epoch,
                        "starts_generation": later and done == 0,
                        "ascending": later and done < ascent_steps,
                        "starts_descent": later and done == ascent_steps and ascent_steps > 0,
                    }
                )
                done += 1
            epoch_now += 1
    return rows


def test_a_quarter_is_rounded_to_whole_steps():
    """Tiny-ImageNet in batches of 32, the generations of the SEAL paper's Table 11, and small ones."""
    steps = {60: 46875, 70: 54688, 80: 62500, 90: 70313, 100: 78125, 160: 125000, 200: 156250}
    for epochs, expected in steps.items():
        assert Clock(3125, epochs, Clock(3125, epochs).quarter).ascent_steps == expected
    for span in range(1, 60):
        assert Clock(1, span).quarter == math.floor(span / 4 + 0.5)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(0, sizes[0] * sizes[1]))
)


@given(sizes)
@settings(deadline=None, max_examples=25)
def test_the_clock_agrees_with_counting(drawn):
    (steps, epochs, generations), ascent_steps = drawn
    clock = Clock(steps, epochs, ascent_steps / steps)
    rows = simulate(steps, epochs, ascent_steps, generations)
    assert clock.steps_per_generation == steps * epochs
    assert clock.ascent_steps == ascent_steps
    traced = jnp.arange(120)  # one length: NumPy speed after the first example
    for question in rows[0]:
        ask = getattr(clock, question)
        expected = [row[question] for row in rows]
        assert [ask(t) for t in range(len(rows))] == expected, question
        np.testing.assert_array_equal(ask(traced)[: len(rows)], expected, question)


@pytest.mark.parametrize("at", [0, 5, 11, 12, 14, 15, 23, 24])
def test_a_traced_step_has_one_program(at):
    clock = Clock(3, 4, 1)
    answers = _compiled(clock)(at)
    row = simulate(3, 4, 3, 3)[at]
    assert {name: value.item() for name, value in answers.items()} == row
    assert _compiled(clock)._cache_size() == 1


_PROGRAMS = {}


def _compiled(clock):
    names = list(simulate(1, 1, 0, 1)[0])
    if clock not in _PROGRAMS:
        _PROGRAMS[clock] = jax.jit(lambda t: {name: getattr(clock, name)(t) for name in names})
    return _PROGRAMS[clock]


def test_schedules_restart():
    clock = Clock(3, 4)
    schedule = clock.restart(lambda step: 10 * step)
    assert [schedule(t) for t in (0, 1, 11, 12, 13, 35, 36)] == [0, 10, 110, 0, 10, 110, 0]
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(schedule))(jnp.arange(36)), np.tile(np.arange(12) * 10, 3)
    )
    assert clock.restart(0.5)(7) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "steps_per_epoch = 0 must"),
        ((-1, 4), "steps_per_epoch = -1 must"),
        ((3, 0), "epochs_per_generation = 0 must"),
        ((3.0, 4), "steps_per_epoch = 3.0 must"),
        ((True, 4), "steps_per_epoch = True must"),
        (("3", 4), "steps_per_epoch = '3' must"),
        ((3, 4, 4.5), "ascent_epochs = 4.5 must lie between 0 and epochs_per_generation = 4"),
        ((3, 4, 5), "ascent_epochs = 5 must lie between 0 and epochs_per_generation = 4"),
        ((3, 4, -1), "ascent_epochs = -1 must"),
        ((3, 4, math.nan), "ascent_epochs = nan must"),
        ((3, 4, "1"), "ascent_epochs = '1' must"),
        ((3, 4, 0.5), "ascent_epochs = 0.5 is 1.5 steps of 3 per epoch"),
    ],
)
def test_clocks_that_cannot_run(arguments, message):
    with pytest.raises(UsageError) as caught:
        Clock(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_may_be_numpy_integers():
    clock = Clock(np.int64(3), np.int16(4), 1)
    assert clock == Clock(3, 4, 1)
    assert type(clock.steps_per_epoch) is int
    assert clock.generation(40_000) == 3333


def test_a_third_of_an_epoch_can_be_whole_steps():
    assert Clock(3, 4, 1 / 3).ascent_steps == 1
    assert Clock(30, 160, 0.1).ascent_steps == 3


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine_in_float64(warmup):
    peak, epochs, steps = 0.1, 160, 7
    schedule = jax.jit(jax.vmap(cosine(peak, epochs=160, steps_per_epoch=7, warmup_epochs=warmup)))
    got = np.asarray(schedule(jnp.arange(epochs * steps))).reshape(epochs, steps)
    assert got.dtype == np.float32
    expected = [
        peak * (e + 1) / warmup
        if e < warmup
        else peak * 0.5 * (1 + math.cos(math.pi * (e - warmup) / (epochs - warmup)))
        for e in range(epochs)
    ]
    for batch in range(steps):
        np.testing.assert_allclose(got[:, batch], expected, rtol=1e-6, atol=0)
    plain = cosine(peak, epochs=160, steps_per_epoch=7, warmup_epochs=warmup)(100 * steps)
    np.testing.assert_allclose(plain, expected[100], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"warmup_epochs": 4}, "warmup_epochs = 4"),
        ({"warmup_epochs": -1}, "warmup_epochs = -1"),
        ({"learning_rate": 0.0}, "learning_rate = 0"),
        ({"learning_rate": -0.1}, "learning_rate = -0.1"),
        ({"learning_rate": math.inf}, "learning_rate = inf"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
    ],
)
def test_cosines_that_cannot_be(options, field):
    arguments = {"learning_rate": 0.1, "epochs": 4, "steps_per_epoch": 2, **options}
    with pytest.raises(UsageError, match=field):
        cosine(**arguments)


def test_steps_fall_at_the_epochs_named():
    schedule = steps(0.1, "3, 1", factor=0.5, steps_per_epoch=4)
    found = [float(schedule(step)) for step in range(20)]
    np.testing.assert_allclose(found, [0.1] * 4 + [0.05] * 8 + [0.025] * 8, rtol=1e-6)
