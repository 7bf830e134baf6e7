"""Studies across runs, as the layerwise paper (Alabdulmohsin et al. 2022) makes them.

Each module has ``section``, which returns a :class:`seal_jax.reports.page.Section`, or a
:class:`seal_jax.reports.page.Missing` that says what these runs lack.
"""
