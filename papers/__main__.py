"""``python -m papers``."""

import sys

from papers.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
