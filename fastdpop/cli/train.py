"""``fastdpop train``: it reads its own arguments, most of which are TRL's."""

from __future__ import annotations

from collections.abc import Sequence

from fastdpop.train.options import short_help

NAME = "train"
ABOUT = "train a causal language model on preference pairs"


def run(argv: Sequence[str]) -> int:
    """Read, train and save."""
    if not argv or {"-h", "--help"} & set(argv):
        print(short_help())
        return 0 if argv else 2
    from fastdpop.integrations.trl.process import end_process, keep_process_groups
    from fastdpop.train.run import run as train

    keep_process_groups()
    code = train(argv)
    end_process(code)
    return code
