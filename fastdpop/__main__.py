"""``python -m fastdpop`` is ``fastdpop``."""

import sys

from fastdpop.cli import main

sys.exit(main())
