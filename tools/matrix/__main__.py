"""``python -m tools.matrix``."""

from tools.matrix.command import main

raise SystemExit(main())
