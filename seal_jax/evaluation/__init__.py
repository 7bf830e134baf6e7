"""The papers' evaluations, as functions of features, logits and weights."""
