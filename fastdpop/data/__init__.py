"""Preference pairs: from files, folders and the hub to one checked and converted data set.

Nothing here ever cuts a text, fills in a field or drops a row.
"""

from fastdpop.data.load import Pairs, load_pairs

__all__ = ["Pairs", "load_pairs"]
