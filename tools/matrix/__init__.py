"""Versions that are tested, not claimed: tests/smoke in environments from the oldest to the newest packages.

python -m tools.matrix                    # every cell, then the table of docs/versions.md
python -m tools.matrix torch2.11 newest   # some
python -m tools.matrix --resolve          # look for newer packages: write requirements/matrix anew
"""
