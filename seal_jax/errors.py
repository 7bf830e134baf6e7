"""The exception for input that the user can fix, with the checks that raise it, and that of buckets."""

import math
import reprlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import jax

# Exit codes of the command line. 74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h, 130 is
# 128 + SIGINT, as shells report it.
OK, CRASHED, USAGE, UNWRITABLE, STOPPED, INTERRUPTED = 0, 1, 2, 74, 75, 130


class UsageError(ValueError):
    """Input that cannot be used: one line that names the field, its value and the fix.

    The command line prints the line and exits with code 2. Library code raises it too; there it is
    an ordinary ``ValueError``.
    """


class BucketError(OSError):
    """A bucket refuses (``EACCES``) or cannot be reached (``EIO``); ``strerror`` says why in one line."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def require_params(params: Any) -> None:
    """Raise unless an optax ``update`` was given the parameters."""
    if params is None:
        # Not a UsageError: a mistake in code, as in optax, and never one of a command line.
        raise ValueError(
            "this transformation needs the parameters: call update(updates, state, params)"
        )


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return ``"; nearest: a, b"`` for the candidates most like ``name``, or ``""`` for none.

    >>> nearest("layr3", ["layer1", "layer3", "fc"], count=1)
    '; nearest: layer3'
    """
    import difflib

    matches = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.3)
    return f"; nearest: {', '.join(matches)}" if matches else ""


def shown(value: Any) -> str:
    """Return ``value`` as a message shows it: on one line, and cut in the middle where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return " ".join(short.repr(value).split())


def positive(value: Any) -> bool:
    """Tell whether ``value`` is positive and finite."""
    return 0 < value < math.inf


def nonnegative(value: Any) -> bool:
    """Tell whether ``value`` is 0, or positive and finite."""
    return 0 <= value < math.inf


def known_zero(value: Any) -> bool:
    """Tell whether ``value`` is known to be 0 when the program is traced."""
    # ``aval``: an array of JAX. Its value is not read: under a trace it has none, and otherwise the host would wait.
    return not hasattr(value, "aval") and not callable(value) and value == 0


def check_number(field: str, value: Any, holds: Callable[[Any], bool], must: str) -> None:
    """Raise unless ``value`` is a number for which ``holds``; arrays, traced or not, pass unread.

    NaN fails every comparison, so ``holds`` must say what is allowed, not what is refused.

    >>> check_number("rho", -1.0, nonnegative, "be 0 or positive")
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: rho = -1 must be 0 or positive
    """
    # A traced array has no value to compare, and reading a concrete one makes the host wait for the device.
    if hasattr(value, "aval"):
        return
    # True is a number to Python, and never a sensible one here.
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not holds(value):
        text = f"{float(value):g}" if number else shown(value)
        raise UsageError(f"{field} = {text} must {must}")


def check_integer(
    field: str, value: Any, least: int, most: int | None = None, *, bounds: str | None = None
) -> int:
    """Return ``value`` as a Python integer; raise unless it is whole and in ``least..most``.

    ``bounds`` says in the message what the range is, where more is to be said than its ends.

    >>> check_integer("k", 1.5, least=1)
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: k = 1.5 must be a whole number of at least 1
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        if bounds is None:
            bounds = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise UsageError(f"{field} = {shown(value)} must be a whole number {bounds}")
    return int(value)


def check_seed(field: str, value: Any) -> int:
    """Return ``value`` as an integer; raise unless every generator of random numbers takes it."""
    return check_integer(field, value, 0, 2**32 - 1)


def check_choice(field: str, value: Any, choices: Iterable[Any], *, suggest: bool = False) -> None:
    """Raise unless ``value`` is one of ``choices``; ``suggest`` adds the nearest ones.

    >>> check_choice("scope", "tree", ("tensor", "global"))
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: scope = 'tree' must be one of tensor, global
    """
    if value not in (known := tuple(choices)):
        names = [str(choice) for choice in known]
        near = nearest(str(value), names) if suggest else ""
        raise UsageError(f"{field} = {value!r} must be one of {', '.join(names)}{near}")


def check_key(field: str, value: Any, *, optional: bool = False) -> Any:
    """Return ``value``; raise unless it is a random key of JAX, of either style, traced or not.

    Where it is ``optional``, None stands for a fixed key.
    """
    if value is None and optional:
        return jax.random.key(0)
    # Typed keys have a dtype of their own; those of the old style are two numbers (threefry) or four (rbg).
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    if dtype is None or not (
        jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        or (dtype == "uint32" and shape in ((2,), (4,)))
    ):
        raise UsageError(f"{field} = {shown(value)} must be a random key: jax.random.key(0)")
    return value


def check_labels(field: str, value: Any, count: int) -> None:
    """Raise unless ``value`` is an array of ``count`` class numbers."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or dtype.kind not in "iu" or shape != (count,):
        raise UsageError(f"{field} is {kind_of(value)}: it must be an array of {count} integers")


def check_features(field: str, value: Any, width: int | None = None) -> None:
    """Raise unless ``value`` is an array ``[n, d]`` of numbers, with d the ``width`` if it is given."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    wide = width is None or shape[1:] == (width,)
    # Kinds are refused by name, since bfloat16 and the 8-bit floats have NumPy's kind V, for void.
    if dtype is None or dtype.kind in "OSUMmb" or len(shape) != 2 or not wide:
        must = f"[n, {'d' if width is None else width}]"
        raise UsageError(f"{field} is {kind_of(value)}: it must be an array {must} of numbers")


def kind_of(value: Any) -> str:
    """Return dtype and shape of an array, or the type of another value, for messages that refuse it."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    return f"a {type(value).__name__}" if dtype is None else f"{dtype}{list(shape or ())}"
