"""What stands for a public name while a package that it needs is not installed."""

from __future__ import annotations

from typing import Any, NoReturn


class Missing:
    """Says what is missing as soon as it is called, derived from or used in ``isinstance``.

    An ``ImportError`` where the name is looked up would break whatever looks at all of a module's names: ``hasattr``,
    ``inspect.getmembers``, completion, ``from fastdpop import *``. An ``AttributeError`` there would lose the reason.
    """

    def __init__(self, name: str, reason: ImportError) -> None:
        self.__name__ = self.__qualname__ = name
        self._reason = reason

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            ImportError: with what to install.
        """
        raise ImportError(str(self._reason), name=self._reason.name) from self._reason

    __call__ = __mro_entries__ = __instancecheck__ = __subclasscheck__ = _refuse

    def __reduce__(self) -> tuple[type, tuple[str, ImportError]]:
        return Missing, (self.__name__, self._reason)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"fastdpop.{self.__name__} has no {name!r}: {self._reason}")

    def __repr__(self) -> str:
        return f"<fastdpop.{self.__name__}, which is not to be had: {self._reason}>"
