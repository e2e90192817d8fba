"""The package's version, where everything may read it: caches are kept apart by it."""

VERSION = "0.1.0"
