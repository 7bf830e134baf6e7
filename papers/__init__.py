"""Reproductions of the papers: the commands for each table and figure, and LW's synthetic experiment."""
