"""Studies across runs, as the layerwise paper (Alabdulmohsin et al. 2022) makes them.

Every study has a function ``section``, which returns a :class:`seal_jax.reports.page.Section`, or a
:class:`seal_jax.reports.page.Missing` that says what these runs lack. ``settings`` is what they share.
"""
