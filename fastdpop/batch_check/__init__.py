"""Looking at a batch before it is trained on: what its tokens say, and what looks wrong."""

from fastdpop.batch_check.check import check_batch
from fastdpop.batch_check.report import BatchReport, Finding

__all__ = ["BatchReport", "Finding", "check_batch"]
