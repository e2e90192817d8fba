"""Names that a caller may have meant by one that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ALSO = {
    # losses
    "dpo_positive": ("dpop",),
    "smaug": ("dpop",),
    "slic": ("hinge",),
    "kto_pair": ("kto",),
    "aot_pair": ("aot",),
    "rso": ("hinge",),
    "cdpo": ("dpo", "robust"),
    "rdpo": ("robust",),
    "dpo": ("sigmoid",),
    "nll": ("sft",),
    "cross_entropy": ("sft",),
    "ld_dpo": ("dpo",),
    "ranking": ("plackett_luce",),
    # options of losses; TRL's and the papers' names among them
    "lambda": ("lam", "nll_weight"),
    "lambd": ("lam",),
    "lmbda": ("lam",),
    "dpop_lambda": ("lam",),
    "temperature": ("beta",),
    "tau": ("beta",),
    "smoothing": ("label_smoothing",),
    "epsilon": ("label_smoothing",),
    "eps": ("label_smoothing",),
    "simpo_gamma": ("gamma",),
    "gamma_beta_ratio": ("gamma",),
    "target_reward_margin": ("gamma",),
    "cpo_alpha": ("nll_weight",),
    "rpo_alpha": ("alpha",),
    "f_divergence_type": ("divergence",),
    "f_alpha_divergence_coef": ("alpha",),
    "discopop_tau": ("tau",),
    # arguments of a call
    "loss_type": ("loss", "preference"),
    "preference_loss": ("loss", "preference"),
    "loss_fn": ("loss", "preference"),
    "reference": ("ref_logps",),
    "reference_logps": ("ref_logps",),
    "ref_logprobs": ("ref_logps",),
    "reference_logprobs": ("ref_logps",),
    "ref_model": ("ref_logps",),
    "reference_model": ("ref_logps",),
    "ref_log_probs": ("ref_logps",),
    "reference_log_probs": ("ref_logps",),
    "ref_chosen_logps": ("ref_logps", "ref_chosen"),
    "ref_rejected_logps": ("ref_logps", "ref_rejected"),
    "reference_chosen_logps": ("ref_logps", "ref_chosen"),
    "reference_rejected_logps": ("ref_logps", "ref_rejected"),
    "chosen_logps": ("chosen",),
    "rejected_logps": ("rejected",),
    "policy_chosen_logps": ("chosen",),
    "policy_rejected_logps": ("rejected",),
    "hidden_states": ("hidden",),
    "lm_head": ("weight",),
    "lm_head_weight": ("weight",),
    "chunk_size": ("workspace_bytes",),
    # values
    "batchmean": ("mean",),
    "average": ("mean",),
    "accuracy": ("token_accuracy", "rewards/accuracies"),
    "accuracies": ("rewards/accuracies",),
    "margin": ("rewards/margins",),
    "margins": ("rewards/margins",),
    "reward": ("rewards/margins",),
    "logits": ("mean_logits",),
    "torch": ("eager",),
    "pytorch": ("eager",),
    "cpp": ("cpu",),
    "cuda": ("triton",),
    "gpu": ("triton",),
}
"""What names that are in use elsewhere are here."""


def near(name: object, known: Iterable[str], likeness: float = 0.7) -> list[str]:
    """At most three of the `known` names that `name` may stand for, the likeliest first.

    Args:
        likeness: from 0 to 1, how alike two words must be.
    """
    names = {_plain(each): each for each in known}
    word = _plain(str(name))
    if not word:
        return []
    if word in names:  # but for case, hyphens and the like
        return [names[word]]
    found = [each for each in _ALSO.get(word, ()) if each in names.values()]
    if not found:
        begun = (n for n in names if n.startswith(f"{word}_"))
        alike = (*begun, *difflib.get_close_matches(word, names, n=3, cutoff=likeness))
        found = [names[each] for each in dict.fromkeys(alike)]
    return found[:3]


def hint(name: object, known: Iterable[str]) -> str:
    """`` (did you mean 'lam'?)``, to stand behind a name in a message; empty where nothing is like it."""
    found = near(name, known)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def _plain(name: str) -> str:
    word = re.sub(r"[^a-z0-9+]+", "_", name.lower().replace("c++", "cpp")).strip("_")
    return word.removesuffix("_loss") or word
