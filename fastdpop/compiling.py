"""What ``torch.compile`` is to do with a function, said without importing ``torch._dynamo``, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let a compiled graph hold what a function gives while it is traced, as ``torch.compiler.assume_constant_result``
    does. That sets this mark too, and imports the compiler in order to do so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
