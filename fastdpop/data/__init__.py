"""Preference pairs: from files, folders and the hub to one checked and converted data set.

:func:`load_pairs` is the way in for data that fit on a disk, :func:`convert_row` for streams.
Nothing here ever cuts a text, fills in a field or drops a row.
"""

from fastdpop.data.load import Pairs, convert_row, load_pairs

__all__ = ["Pairs", "convert_row", "load_pairs"]
