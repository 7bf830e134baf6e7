"""The five eigenvalues of largest magnitude of a small ResNet's Hessian: Lanczos and power iteration.

    python -m benchmarks.eigenvalues

About two minutes on two CPU cores. A resnet8 is trained for a moment on the handwritten digits; its
Hessian is that of the mean loss over some hundreds of them, in inference mode. Three programs look for
the same eigenpairs, all until every residual |H v - value v| is at most the tolerance times the
largest eigenvalue, in turn, in one run:

* "lanczos": ``seal_jax.hessian.eigenpairs``.
* "power": ``seal_jax.hessian.power_iteration``, the same products, one vector after the other.
* "power, torch": power iteration with deflation as PyHessian does it (Yao et al. 2020), in PyTorch
  with the same weights: the gradient's graph is built once, and each product differentiates it; on
  one thread or all, whichever is faster. Left out where PyTorch is not installed.

"products" are products with the Hessian; "fewer" is how many times fewer Lanczos needs, "faster" how
many times less time, from the fastest rounds, "median" that of the rounds. "error" is the largest
difference of the eigenvalues from those of Lanczos, over the largest.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from seal_jax import hessian, models
from seal_jax.losses import mean_cross_entropy


class Result(NamedTuple):
    values: np.ndarray
    residuals: np.ndarray
    products: int


class Problem(NamedTuple):
    """A network, its weights, and the images of its loss, normalised."""

    model: models.Model
    variables: Any
    images: np.ndarray
    labels: np.ndarray


def create_problem(width: int, images: int, steps: int) -> Problem:
    """Return a network after some steps of training; the Hessian of one at random says little."""
    split = common.digits(0.0).train
    # Normalised roughly: what matters is that all solvers get the same images.
    pixels = (split.images[:images] / 255.0 - 0.3).astype(np.float32)
    labels = split.labels[:images]
    model = models.create(
        "resnet8",
        num_classes=10,
        image_shape=(8, 8, 1),
        width=width,
        convolution=common.convolution(),
    )
    variables = model.init(jax.random.key(0))
    tx = optax.sgd(0.05, momentum=0.9)

    def step(carry, rows):
        params, statistics, state = carry

        def objective(params):
            logits, changed = model.module.apply(
                {"params": params, "batch_stats": statistics},
                jnp.asarray(pixels)[rows],
                train=True,
                mutable=["batch_stats"],
            )
            return mean_cross_entropy(logits, jnp.asarray(labels)[rows]), changed["batch_stats"]

        gradient, statistics = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), statistics, state), None

    rows = np.random.default_rng(0).integers(0, images, (steps, min(64, images)))  # [steps, batch]
    start = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    (params, statistics, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, rows))(start)
    return Problem(model, {"params": params, "batch_stats": statistics}, pixels, labels)


def seal_solvers(
    problem: Problem, k: int, tolerance: float, most: int
) -> dict[str, Callable[[], Result]]:
    """Return Lanczos and power iteration of this package."""

    def loss(variables, batch):
        logits = problem.model.module.apply(variables, batch[0], train=False)
        return mean_cross_entropy(logits, batch[1])

    # One batch of all images, [1, images, ...]. The mask leaves the BatchNorm statistics out of the Hessian.
    data = jnp.asarray(problem.images)[None], jnp.asarray(problem.labels)[None]
    op = hessian.operator(loss, problem.variables, data, mask="params")

    def lanczos() -> Result:
        pairs = hessian.eigenpairs(op, k, "LM", tolerance=tolerance, max_products=most)
        return Result(pairs.values, pairs.residuals, pairs.products)

    def power() -> Result:
        pairs = hessian.power_iteration(op, k, tolerance=tolerance, max_products=most)
        return Result(pairs.values, pairs.residuals, pairs.products)

    return {"lanczos": lanczos, "power": power}


def torch_power_iteration(
    problem: Problem, k: int, tolerance: float, most: int
) -> Callable[[], Result]:
    """Return power iteration with deflation in PyTorch."""
    # Inside: the benchmark also runs without PyTorch.
    import torch

    from benchmarks import torch_networks

    # The comparison is fair only if both are the same network.
    torch_networks.check_equal(problem.model, problem.variables, problem.images)
    network = torch_networks.copy(problem.model, problem.variables)
    images = torch.tensor(np.transpose(problem.images, (0, 3, 1, 2)).copy())
    labels = torch.tensor(problem.labels.astype(np.int64))
    weights = list(network.parameters())

    def dot(a, b):
        return sum(torch.sum(x * y) for x, y in zip(a, b, strict=True))

    def unit(vector, others):
        for other in others:
            part = dot(vector, other)
            vector = [x - part * y for x, y in zip(vector, other, strict=True)]
        length = torch.sqrt(dot(vector, vector)) + 1e-30
        return [x / length for x in vector]

    # With its graph, so that each product is one more derivative of it.
    def gradient():
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, weights, create_graph=True)

    # Seconds of one product, to choose the number of threads.
    def once(threads: int) -> float:
        torch.set_num_threads(threads)
        slope, start = gradient(), time.perf_counter()
        torch.autograd.grad(slope, weights, [weight.detach() for weight in weights])
        return time.perf_counter() - start

    def power() -> Result:
        torch.manual_seed(0)
        slope = gradient()
        vectors: list[Any] = []
        values, residuals, products = [], [], 0
        for index in range(k):
            # As in `hessian.power_iteration`: earlier vectors must be more exact, since their errors stay in
            # the residuals of later ones.
            limit = tolerance * 2 ** (-(k - 1 - index) / 2)
            vector = unit([torch.randn_like(weight) for weight in weights], vectors)
            for _ in range(most):
                image = torch.autograd.grad(slope, weights, vector, retain_graph=True)
                products += 1
                value = float(dot(image, vector))
                # The residual H v - value v, of the unit vector v.
                rest = [x - value * y for x, y in zip(image, vector, strict=True)]
                residual = float(torch.sqrt(dot(rest, rest)))
                if residual <= limit * max(abs(v) for v in [*values, value]):
                    break
                # Deflation: the next vector is orthogonal to the eigenvectors found so far.
                vector = unit(image, vectors)
            vectors.append(vector)
            values.append(value)
            residuals.append(residual)
        return Result(np.array(values), np.array(residuals), products)

    # On a busy machine several threads wait for each other many times longer than they compute.
    counts = {1, torch.get_num_threads()}
    torch.set_num_threads(min(counts, key=lambda threads: min(once(threads) for _ in range(3))))
    return power


def compare(
    title: str, candidates: Mapping[str, Callable[[], Result]], rounds: int
) -> common.Report:
    results: dict[str, Result] = {}

    # The timing drops what a candidate returns; its result is needed for the table.
    def keep(name: str) -> Callable[[], Any]:
        def call() -> np.ndarray:
            results[name] = candidates[name]()
            return results[name].values

        return call

    times = common.interleave({name: keep(name) for name in candidates}, rounds)
    best = results["lanczos"]
    largest = float(np.abs(best.values).max())
    # Sorted, since the solvers give equal pairs in other orders.
    wanted = np.sort(best.values)
    rows = []
    for name, result in results.items():
        fastest, median = common.ratio(times, name, "lanczos")
        rows.append(
            {
                "solver": name,
                "products": result.products,
                "seconds": min(times[name]),
                "ms/product": 1e3 * min(times[name]) / result.products,
                "residual": float(result.residuals.max()) / largest,
                "largest": float(result.values.max()),
                "error": float(np.abs(np.sort(result.values) - wanted).max()) / largest,
                "fewer": result.products / best.products,
                "faster": fastest,
                "median": median,
            }
        )
    return common.Report(f"{title}, {rounds} rounds", rows)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=3, argv=argv)
    if options.quick:
        width, images, steps, k, tolerance, most = 4, 32, 2, 2, 0.1, 30
    else:
        width, images, steps, k, tolerance, most = 8, 256, 60, 5, 1e-3, 1000
    problem = create_problem(width, images, steps)
    candidates = seal_solvers(problem, k, tolerance, most)
    if importlib.util.find_spec("torch") is not None:
        candidates["power, torch"] = torch_power_iteration(problem, k, tolerance, most)
    size = sum(leaf.size for leaf in jax.tree.leaves(problem.variables["params"]))
    title = (
        f"top {k} of resnet8, width {width}, {size} parameters, {images} digits, "
        f"residual {tolerance:g}"
    )
    common.publish("eigenvalues", [compare(title, candidates, options.rounds)], options.json)


if __name__ == "__main__":
    main()
