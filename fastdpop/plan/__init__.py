"""``fastdpop plan``: estimates of memory and time of preference training on many GPUs.

    model       parameters, and what layers keep and multiply, from a configuration alone
    trace       how the latter is measured, on tensors without memory
    heads       memory and products of the lm_head, fastdpop's and others'
    hardware    GPUs and what connects them
    memory      what a rank holds, moment by moment
    speed       how long a step takes
    settings    the ways to divide the work, compared
    report      as text and as JSON

Nothing here runs on a GPU or communicates. Every number is an estimate.
"""

from fastdpop.plan.hardware import Cluster
from fastdpop.plan.memory import Job, Memory, Setting
from fastdpop.plan.model import Lora, Model, read_config
from fastdpop.plan.settings import Estimate, compare

__all__ = [
    "Cluster",
    "Estimate",
    "Job",
    "Lora",
    "Memory",
    "Model",
    "Setting",
    "compare",
    "read_config",
]
