"""Where the Triton kernels are: the folder ``kernels/`` at the root of the repository, installed as
``fastdpop/kernels/``.

The folder has no ``__init__.py``, or it would be taken for a package of that name in a checkout;
this module is the package that they are submodules of. Importing it needs no triton; importing one
of them does.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED, _CHECKOUT = _HERE / "kernels", _HERE.parent / "kernels"
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT)]
