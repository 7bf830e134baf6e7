"""Compiled programs are forgotten before they fill the memory maps of a process."""

import jax
import jax.numpy as jnp
import pytest

from seal_jax.core import programs


@pytest.mark.skipif(not programs._MAPS.exists(), reason="no /proc here")
def test_programs_are_forgotten_where_there_is_little_room(tmp_path, monkeypatch):
    # One of its own, since JAX would keep that of jnp.sin for others.
    compiled = jax.jit(lambda x: jnp.sin(x) + 1)
    compiled(jnp.ones(3))
    for most, left in ((10**9, 1), (10, 0)):
        (tmp_path / "most").write_text(f"{most}\n")
        monkeypatch.setattr(programs, "_MOST_MAPS", tmp_path / "most")
        programs.make_room()
        assert compiled._cache_size() == left
    monkeypatch.setattr(programs, "_MOST_MAPS", tmp_path / "absent")
    programs.make_room()
    assert compiled(jnp.zeros(3)).tolist() == [1, 1, 1]
