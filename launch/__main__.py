"""``python -m launch``."""

import sys

from launch.command import run

sys.exit(run(sys.argv[1:]))
