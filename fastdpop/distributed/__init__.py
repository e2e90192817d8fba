"""What several processes do together: groups, collectives, and what is built of them. Nothing outside this
folder talks to another process.
"""

from fastdpop.distributed.groups import Group

__all__ = ["Group"]
