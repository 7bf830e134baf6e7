"""The one exception for input that the user can mend."""


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
