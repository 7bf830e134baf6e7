"""Reproducing the papers: the list of what reproduces each table and figure, the synthetic experiment of LW."""
