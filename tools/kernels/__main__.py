"""``python -m tools.kernels``."""

import sys

from tools.kernels.command import main

if __name__ == "__main__":
    sys.exit(main())
