"""Which method is best where: a decision tree on the design of experiments (LW paper, Figure 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.errors import UsageError, check_integer

MAX_DEPTH = 4
MIN_LEAF = 7
IMPURE = 0.5  # a leaf with a larger Gini index names several methods


class Node(NamedTuple):
    """A set of settings, and how it is divided.

    Attributes:
      counts: in how many of the settings each method is the best; those that never are left out.
      question: what divides them, such as "model = vgg16"; empty for a leaf.
      yes: the settings for which the answer is yes; ``None`` for a leaf.
      no: the others.
    """

    counts: Mapping[str, int]
    question: str = ""
    yes: Node | None = None
    no: Node | None = None

    @property
    def samples(self) -> int:
        """Number of settings."""
        return sum(self.counts.values())

    @property
    def gini(self) -> float:
        """Gini index: the chance that two settings, drawn with replacement, differ in the best.

        >>> Node({"LW": 1, "FC": 1}).gini
        0.5
        """
        return 1 - sum((count / self.samples) ** 2 for count in self.counts.values())

    @property
    def top(self) -> tuple[str, ...]:
        """The most frequent method; with a Gini index over 0.5, those that make up half together.

        Methods as frequent as the last of these are named too.

        >>> Node({"LW": 9, "FC": 3, "BL": 1}).top, Node({"LW": 4, "FC": 3, "BL": 3, "DSD": 1}).top
        (('LW',), ('LW', 'FC', 'BL'))
        """
        # A stable sort: of methods equally frequent, the one that was counted first comes first.
        ordered = sorted(self.counts, key=lambda name: -self.counts[name])
        if self.gini <= IMPURE:
            return (ordered[0],)
        sums = np.cumsum([self.counts[name] for name in ordered])
        # argmax of booleans is the first place at which the sum reaches half of the settings.
        least = self.counts[ordered[int(np.argmax(2 * sums >= self.samples))]]
        return tuple(name for name in ordered if self.counts[name] >= least)

    @property
    def children(self) -> tuple[Node, ...]:
        """``yes`` and ``no``; none of a leaf."""
        return tuple(node for node in (self.yes, self.no) if node is not None)

    def leaves(self) -> list[Node]:
        """Return the leaves, those of ``yes`` first."""
        return [leaf for child in self.children for leaf in child.leaves()] or [self]

    @property
    def depth(self) -> int:
        """Questions on the longest path to a leaf."""
        return max((1 + child.depth for child in self.children), default=0)

    @property
    def shares(self) -> str:
        """The counts as text, the largest first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {count}" for name, count in ordered)

    def as_text(self) -> str:
        """Return the tree, one line per node.

        >>> print(Node({"A": 3, "B": 2}, "x <= 1", Node({"A": 3}), Node({"B": 2})).as_text())
        x <= 1?  (A 3, B 2)
          yes: A  (Gini 0.00; A 3)
          no:  B  (Gini 0.00; B 2)
        """
        return "\n".join(self._lines("", ""))

    def _lines(self, indent: str, answer: str) -> Iterator[str]:
        if not self.children:
            names = " or ".join(self.top)
            yield f"{indent}{answer}{names}  (Gini {self.gini:.2f}; {self.shares})"
            return
        yield f"{indent}{answer}{self.question}?  ({self.shares})"
        for child, word in zip(self.children, ("yes: ", "no:  "), strict=True):
            yield from child._lines(indent + "  ", word)


def fit(
    features: Mapping[str, Sequence[Any]],
    best: Sequence[str],
    *,
    max_depth: int = MAX_DEPTH,
    min_leaf: int = MIN_LEAF,
) -> Node:
    """Fit scikit-learn's decision tree to the best method of each setting; return its root.

    Args:
      features: by name, one value per setting: numbers are divided by a threshold, booleans and
        strings one value against the others.
      best: the best method of each setting.
      max_depth: of the tree; the paper's 4.
      min_leaf: settings in a leaf at least; the paper's 7.

    Raises:
      UsageError: no settings or no features, features of another length than ``best``, or a number
        out of range.

    References:
      Alabdulmohsin et al. 2022, section 3.1 and Figure 3.

    >>> print(fit({"images": [1, 2, 8, 9]}, ["LW", "LW", "BL", "BL"], min_leaf=2).as_text())
    images <= 5?  (LW 2, BL 2)
      yes: LW  (Gini 0.00; LW 2)
      no:  BL  (Gini 0.00; BL 2)
    """
    from sklearn.tree import DecisionTreeClassifier

    check_integer("max_depth", max_depth, 1)
    check_integer("min_leaf", min_leaf, 1)
    for name, values in features.items():
        if len(values) != len(best):
            raise UsageError(f"feature {name} has {len(values)} values for {len(best)} settings")
    columns, questions = _columns(features)
    if not len(best) or not columns:
        raise UsageError("a decision tree needs settings, and a feature of them at least")
    # Of features that divide equally well, scikit-learn takes one at random.
    classifier = DecisionTreeClassifier(
        max_depth=max_depth, min_samples_leaf=min_leaf, random_state=0
    )
    matrix = np.stack(columns, axis=1).astype(float)  # [settings, questions]
    classifier.fit(matrix, np.asarray(best, dtype=object).astype(str))
    tree = classifier.tree_
    went_through = classifier.decision_path(matrix).toarray().astype(bool)  # [settings, nodes]

    def node(index: int) -> Node:
        inside = [name for name, here in zip(best, went_through[:, index], strict=True) if here]
        counts = {name: inside.count(name) for name in dict.fromkeys(inside)}
        left, right = int(tree.children_left[index]), int(tree.children_right[index])
        # scikit-learn marks a leaf's children by -1.
        if left < 0:
            return Node(counts)
        question = questions[int(tree.feature[index])]
        # scikit-learn sends values up to the threshold to the left, which here is "yes".
        if question.endswith("<="):
            return Node(counts, f"{question} {tree.threshold[index]:,.6g}", node(left), node(right))
        return Node(counts, question, node(right), node(left))  # 0 or 1: the right is the ones

    return node(0)


def _columns(features: Mapping[str, Sequence[Any]]) -> tuple[list[np.ndarray], list[str]]:
    """Return a column of numbers for each thing that can be asked, and the questions."""
    columns: list[np.ndarray] = []
    questions: list[str] = []
    for name, values in features.items():
        # A category becomes a column of 0 and 1 for each of its values, since scikit-learn divides numbers only.
        if any(isinstance(value, str) for value in values):
            for choice in dict.fromkeys(values):
                columns.append(np.asarray([value == choice for value in values], float))
                questions.append(f"{name} = {choice}")
        else:
            columns.append(np.asarray(values, float))
            boolean = all(isinstance(value, (bool, np.bool_)) for value in values)
            questions.append(name if boolean else f"{name} <=")
    return columns, questions
