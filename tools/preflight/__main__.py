"""``python -m tools.preflight``."""

import sys

from tools.preflight.command import run

# The compiler's process imports this file too.
if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
