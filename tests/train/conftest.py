"""No test finds log-probs that another has cached."""

from tests.integrations.conftest import cache

__all__ = ["cache"]
