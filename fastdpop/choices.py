"""The words that arguments take. Each list stands once: type checkers read it as a type, and the check of an argument
reads its :func:`words`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

LossName = Literal[
    "dpop",
    "dpo",
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "dpo_shift",
    "cal_dpo",
    "rpo_sq",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "plackett_luce",
    "listwise",
    "aot",
    "aot_unpaired",
    "kto",
    "sft",
    "cpo",
    "simpo",
    "alpha_po",
    "orpo",
    "aft",
    "mpo",
    "rpo",
]
EngineName = Literal["auto", "cpu", "eager", "triton"]
"""The engines of this package; one that :func:`fastdpop.engines.register` adds has a name of its own."""
Reduction = Literal["mean", "sum", "none"]
LogpsReduction = Literal["sequence", "token"]
GradReduction = Literal["mean", "sum"]
Statistic = Literal["entropy", "mean_logits", "token_accuracy", "displacement"]
Form = Literal["inside", "outside", "additive"]
"""Where DPOP's lambda stands."""
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Per = Literal["token", "sequence"]
"""What the SFT loss is a mean over."""


def words(kind: Any) -> tuple[str, ...]:
    """Of one of these types, in order; where there is a default, it is the first."""
    return get_args(kind)
