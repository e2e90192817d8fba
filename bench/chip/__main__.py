"""``python -m bench.chip``."""

from bench.chip.command import main

if __name__ == "__main__":
    main()
