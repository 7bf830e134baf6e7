"""Experiments of the papers, run again from one command each, with the papers' numbers beside."""
