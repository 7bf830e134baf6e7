"""The one exception for input that the user can mend."""

from collections.abc import Callable
from numbers import Real
from typing import Any

# ValueError, not UsageError: a mistake in code, as in optax, and never one of a command line.
NO_PARAMS = "this transformation needs the parameters: call update(updates, state, params)"


class UsageError(ValueError):
    """Input that cannot be used: one line that names the field, its value and the mend.

    The command line prints the line and exits with code 2. Library code raises it too; there it is
    an ordinary ``ValueError``.
    """


def nearest(name: str, candidates, count: int = 3) -> str:
    """Return ``"; nearest: a, b"`` for the candidates most like ``name``, or ``""`` for none.

    >>> nearest("layr3", ["layer1", "layer3", "fc"], count=1)
    '; nearest: layer3'
    """
    import difflib

    found = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.3)
    return f"; nearest: {', '.join(found)}" if found else ""


def check_number(field: str, value: Any, holds: Callable[[Any], bool], must: str) -> None:
    """Raise unless ``value`` is a number for which ``holds``; arrays, traced or not, pass unread.

    NaN fails every comparison, so state ``holds`` as what is wanted, not as what is not.
    """
    if hasattr(value, "aval"):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        shown = f"{value:g}" if isinstance(value, Real) else repr(value)
        raise UsageError(f"{field} = {shown} must {must}")
