"""``python -m tools.preflight``."""

import sys

from tools.preflight.command import run

# The guard is needed: the compiler's process, which is spawned, imports this file too.
if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
