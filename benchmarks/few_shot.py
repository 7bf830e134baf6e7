"""600 few-shot episodes as one program, against the public protocol's loop in PyTorch.

    python -m benchmarks.few_shot

About a minute on two CPU cores; it needs PyTorch. Both sides learn the same episodes (5-way 5-shot,
15 queries a class, cached features of 512 numbers): a linear classifier, SGD with momentum and
dampening 0.9, batches of 4, 100 epochs, from the same weights and in the same order. The loop trains
one episode after the other, step by step, as the public code does (Guo et al. 2020), on one thread,
where it is fastest; its episodes are drawn before the clock starts, ours in the measured time. It runs
on a few of the episodes, different ones in each round, and its time is scaled to all of them. That the
accuracies of these are the same is asserted.

"ratio" is the loop's time over the candidate's without compilation, from the fastest rounds;
"median" is the median of the rounds' ratios. "with compilation" adds that of our program once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from benchmarks import common
from seal_jax.evaluation import few_shot
from seal_jax.evaluation.few_shot import Episode, Protocol

SIZE = 512
CLASSES, IMAGES = 10, 200
SAMPLE = 4  # episodes of the loop in a round
AIM = 20  # times as fast as the loop


def features(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features of classes that are close to each other, after a ReLU as in a network."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), IMAGES)
    centres = random.normal(size=(CLASSES, SIZE))
    found = 0.25 * centres[labels] + random.normal(size=(len(labels), SIZE))
    return np.maximum(found, 0).astype(np.float32), labels


def loop(table: np.ndarray, drawn: Sequence[Episode], protocol: Protocol) -> np.ndarray:
    """Return the accuracies of episodes, each learned by PyTorch step by step."""
    import torch

    found = []
    # Support and query images of an episode are sorted by class.
    targets = torch.arange(protocol.ways).repeat_interleave(protocol.shots)
    truth = torch.arange(protocol.ways).repeat_interleave(protocol.queries)
    for each in drawn:
        support, query = torch.from_numpy(table[each.support]), torch.from_numpy(table[each.query])
        head = torch.nn.Linear(table.shape[1], protocol.ways)
        # The initial weights and the order of the images are the episode's, as in our program.
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(each.kernel))
            head.bias.copy_(torch.from_numpy(each.bias))
        optimizer = torch.optim.SGD(
            head.parameters(),
            lr=protocol.learning_rate,
            momentum=protocol.momentum,
            dampening=protocol.dampening,
            weight_decay=protocol.weight_decay,
        )
        criterion = torch.nn.CrossEntropyLoss()
        for order in each.orders:
            for start in range(0, len(order), protocol.batch_size):
                rows = torch.from_numpy(order[start : start + protocol.batch_size])
                optimizer.zero_grad()
                criterion(head(support[rows]), targets[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            found.append((head(query).argmax(1) == truth).double().mean().item())
    return np.array(found)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=5, argv=argv)
    try:
        import torch
    except ImportError:
        raise SystemExit("benchmarks.few_shot compares with PyTorch: pip install torch") from None
    episodes, sample = (6, 2) if options.quick else (600, SAMPLE)
    protocol = Protocol(epochs=2) if options.quick else Protocol()
    table, labels = features()
    images_of_class = few_shot.check(labels, protocol)
    drawn = [
        few_shot.draw(images_of_class, SIZE, protocol, seed=0, number=number)
        for number in range(options.rounds * sample)
    ]
    accuracies: dict[int, float] = {}
    left = iter(range(options.rounds))

    def torch_loop() -> None:
        first = next(left) * sample
        found = loop(table, drawn[first : first + sample], protocol)
        accuracies.update(zip(range(first, first + sample), found.tolist(), strict=True))

    def ours() -> np.ndarray:
        return few_shot.linear(table, labels, protocol, episodes=episodes).accuracies

    # Its products are so small that a second thread only costs time.
    torch.set_num_threads(1)
    # The first call has the compilation. The loop's warm-up is one epoch of one episode, and `interleave` does
    # none, since each call of the loop takes the next episodes.
    start = time.perf_counter()
    whole = ours()
    first_call = time.perf_counter() - start
    loop(table, drawn[:1], Protocol(epochs=1))
    times = common.interleave(
        {"loop": torch_loop, "one program": ours}, options.rounds, warm_up=False
    )
    for number, accuracy in accuracies.items():
        if number < episodes and abs(whole[number] - accuracy) > 1e-6:
            raise AssertionError(
                f"episode {number}: {whole[number]:.4f} here, {accuracy:.4f} there"
            )
    times["loop"] = [each * episodes / sample for each in times["loop"]]
    compilation = max(0.0, first_call - min(times["one program"]))
    rows = []
    for name, own in times.items():
        fastest, median = common.ratio(times, "loop", name)
        with_compilation = min(own) + (compilation if name != "loop" else 0)
        rows.append(
            {
                "episodes as": name,
                f"s for {episodes}": min(own),
                "episodes/s": episodes / min(own),
                "ratio": fastest,
                "median": median,
                "with compilation": min(times["loop"]) / with_compilation,
                "aim": float(AIM) if name != "loop" else 1.0,
            }
        )
    title = (
        f"{episodes} episodes of 5-way 5-shot on {SIZE} features, mean accuracy {whole.mean():.4f}, "
        f"{options.rounds} rounds; the loop (torch {torch.__version__}, one thread) "
        f"on {sample} a round, scaled; {len(accuracies)} accuracies compared"
    )
    common.publish("few_shot", [common.Report(title, rows)], options.json)


if __name__ == "__main__":
    main()
