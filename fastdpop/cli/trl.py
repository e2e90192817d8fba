"""``fastdpop trl``: TRL's own command, whose trainer computes with fastdpop."""

from __future__ import annotations

NAME = "trl"
ABOUT = "run TRL's own `trl dpo`, with DPOP and without logits"
HELP = """\
usage: fastdpop trl dpo [OPTION ...]

Runs `trl dpo` with fastdpop's loss: --loss_type dpop --dpop_lambda 50, --share_prefixes and every
option of TRL, from the command line or from a YAML file (--config FILE); what TRL does not know
goes to `accelerate launch` (--multi_gpu --num_processes 8, --accelerate_config fsdp2).

`fastdpop trl dpo --help` lists TRL's options.
"""


def run(argv: list[str]) -> int:
    """Run what follows ``fastdpop trl``; the exit code is that of the training.

    Raises:
        ValueError, OSError, ImportError: the command line cannot be served, or TRL is not installed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    command, *options = argv
    if command != "dpo":
        raise ValueError(
            f"the command of TRL is {command!r}, expected 'dpo', the one whose loss fastdpop computes: "
            "run others as TRL has them, `trl ...`"
        )
    from fastdpop.integrations.trl.command import launch

    return launch(options)
