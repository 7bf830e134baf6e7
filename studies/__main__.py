"""Entry point: ``python -m studies``."""

import sys

from studies.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
