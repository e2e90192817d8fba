"""``python -m fastdpop.cli`` is ``fastdpop``."""

import sys

from fastdpop.cli import main

sys.exit(main())
