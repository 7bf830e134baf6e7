"""k-NN probes, as prediction depth needs them, against scikit-learn's brute force.

    python -m benchmarks.neighbours

Under a minute on two CPU cores. A bank of 10,000 vectors of 512 numbers in 10 classes, 2,000
queries, k = 5, Euclidean distance: what one layer of a network takes. Both sides predict the class of
every query from arrays in host memory, and that they predict the same is asserted.

"ratio" is scikit-learn's time over the candidate's, from the fastest rounds; "median" is the median
of the rounds' ratios. Ours bounds its memory by ``byte_budget``: "small budget" has 16 MiB for what
is on the device at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import common
from seal_jax.evaluation.prediction_depth import knn

SIZE, CLASSES, K = 512, 10, 5


def vectors(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors of overlapping classes, float32 ``[count, SIZE]``, and their classes."""
    random = np.random.default_rng(seed)
    # The centres do not depend on the seed: bank and queries are of the same classes.
    centres = np.random.default_rng(0).normal(size=(CLASSES, SIZE))
    labels = random.integers(0, CLASSES, count)
    found = 0.25 * centres[labels] + random.normal(size=(count, SIZE))
    return found.astype(np.float32), labels


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=5, argv=argv)
    count, asked = (200, 50) if options.quick else (10_000, 2_000)
    (bank, labels), (queries, truth) = vectors(count, 1), vectors(asked, 2)
    found: dict[str, np.ndarray] = {}

    def sklearn() -> None:
        # Fitting is part of the time: with "brute" it only checks and stores the bank.
        model = KNeighborsClassifier(n_neighbors=K, algorithm="brute").fit(bank, labels)
        found["scikit-learn"] = model.predict(queries)

    def ours() -> None:
        found["ours"] = knn(bank, labels, queries, k=K)

    def small() -> None:
        found["small budget"] = knn(bank, labels, queries, k=K, byte_budget=2**24)

    # Predictions are kept to be compared: a faster answer must be the same answer.
    candidates = {"scikit-learn": sklearn, "ours": ours, "small budget": small}
    times = common.interleave(candidates, options.rounds)
    for name, predictions in found.items():
        differ = int((predictions != found["scikit-learn"]).sum())
        if differ:
            raise AssertionError(f"{name} gives {differ} of {asked} queries another class")
    rows = []
    for name, own in times.items():
        fastest, median = common.ratio(times, "scikit-learn", name)
        rows.append(
            {
                "neighbours by": name,
                "ms": 1e3 * min(own),
                "queries/s": asked / min(own),
                "ratio": fastest,
                "median": median,
            }
        )
    right = (found["ours"] == truth).mean()
    title = (
        f"{asked} queries, a bank of {count} x {SIZE}, k = {K}, {options.rounds} rounds; "
        f"predictions the same, {right:.4f} of them right"
    )
    common.publish("neighbours", [common.Report(title, rows)], options.json)


if __name__ == "__main__":
    main()
