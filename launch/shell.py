"""Runs the tools of a target, or prints what it would run."""

from __future__ import annotations

import shlex
import subprocess
import sys

from seal_jax.errors import UsageError

_INSTALL = {
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
    "kubectl": "see https://kubernetes.io/docs/tasks/tools",
    "sbatch": "run this on a login node of the cluster",
    "squeue": "run this on a login node of the cluster",
    "scancel": "run this on a login node of the cluster",
    "sky": 'pip install "skypilot[gcp]"',
    "git": "see https://git-scm.com",
}


class ToolError(Exception):
    """A tool ended with another exit code than 0, which becomes the launcher's own."""

    def __init__(self, done: subprocess.CompletedProcess[str], fix: str) -> None:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # gcloud and kubectl begin the line that says what is wrong with "ERROR" or "error".
        wrong = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        reason = wrong[0] if wrong else "it says nothing"
        super().__init__(
            f"{shlex.join(done.args[:5])} ... ended with {done.returncode}: {reason}; {fix}"
        )
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr


class Shell:
    """Runs commands. A dry one prints them instead, as they could be pasted into a shell."""

    def __init__(self, *, dry: bool = False) -> None:
        self.dry = dry

    def run(self, *words: str, fix: str, stdin: str | None = None) -> str:
        """Run a command and return its standard output, which for a dry one is empty.

        Raises:
          ToolError: it failed; the message ends in the ``fix``.
        """
        if self.dry:
            # Quoted: nothing in the text is expanded.
            text = "" if stdin is None else f" <<'END_OF_INPUT'\n{stdin.rstrip()}\nEND_OF_INPUT"
            print(shlex.join(words) + text)
            return ""
        done = self._call(words, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise ToolError(done, fix)
        return done.stdout

    def undo(self, *words: str) -> None:
        """Run a command that takes back what was created; one that fails says so, and others follow."""
        try:
            self.run(*words, fix="do it by hand")
        except ToolError as error:
            if "NOT_FOUND" not in error.stderr:
                print(f"error: {error}", file=sys.stderr)

    def show(self, *words: str) -> int:
        """Run a command with its output on the terminal; return its exit code."""
        if self.dry:
            print(shlex.join(words))
            return 0
        return self._call(words).returncode

    def _call(self, words: tuple[str, ...], **options) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(words, check=False, **options)
        except FileNotFoundError:
            raise UsageError(f"{words[0]} is not installed; {_INSTALL[words[0]]}") from None
