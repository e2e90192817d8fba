"""No test finds data that another has cached."""

from tests.integrations.conftest import cache

__all__ = ["cache"]
