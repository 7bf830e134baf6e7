"""Leaf types that methods, training, evaluators and reports share."""
