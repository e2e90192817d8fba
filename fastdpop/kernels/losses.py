"""Losses of a pair for :func:`.pair_loss.pair_loss_kernel`: values with their derivatives.

The formulas, their papers and their options stand in :mod:`fastdpop.losses`; these are those of its
losses that need the two log-ratios of a pair, their lengths and at most three numbers, written for
one launch, and a test holds each to its original, value and derivatives.

Each takes the log-ratios ``r_w`` and ``r_l`` of chosen and rejected, the lengths ``n_w`` and
``n_l`` (1 for an empty completion) and three numbers, and returns ``L, dL/dr_w, dL/dr_l``. A loss
without a kernel goes through the engine's callback instead, at the price of its launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl

from .tiles import LN2, LOG2E


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))`` = -log sigmoid(-x), by its series in exp(-|x|) where that is small."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    log = tl.where(
        e < 0.03,
        e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * 0.25))),
        tl.log2(1.0 + e) * LN2,
    )
    return tl.maximum(x, 0.0) + log


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _smoothed(z, smoothing):
    """cDPO's value and derivative in z."""
    value = (1.0 - smoothing) * _softplus(-z) + smoothing * _softplus(z)
    return value, smoothing * _sigmoid(z) - (1.0 - smoothing) * _sigmoid(-z)


@triton.jit
def dpop_inside(r_w, r_l, n_w, n_l, beta, lam, smoothing):
    below = tl.where(r_w < 0.0, lam, 0.0)  # off at 0
    value, d = _smoothed(beta * (r_w - r_l + below * r_w), smoothing)
    return value, d * beta * (1.0 + below), -d * beta


@triton.jit
def dpop_outside(r_w, r_l, n_w, n_l, beta, lam, smoothing):
    below = tl.where(r_w < 0.0, lam, 0.0)
    value, d = _smoothed(beta * (r_w - r_l) + below * r_w, smoothing)
    return value, d * (beta + below), -d * beta


@triton.jit
def dpop_additive(r_w, r_l, n_w, n_l, beta, lam, smoothing):
    below = tl.where(r_w < 0.0, lam, 0.0)
    value, d = _smoothed(beta * (r_w - r_l), smoothing)
    return value - below * r_w, d * beta - below, -d * beta


@triton.jit
def dpo(r_w, r_l, n_w, n_l, beta, smoothing, unused):
    value, d = _smoothed(beta * (r_w - r_l), smoothing)
    return value, d * beta, -d * beta


@triton.jit
def dpo_per_token(r_w, r_l, n_w, n_l, beta, unused0, unused1):
    value, d = _smoothed(beta * (r_w / n_w - r_l / n_l), 0.0)
    return value, d * beta / n_w, -d * beta / n_l


@triton.jit
def ipo(r_w, r_l, n_w, n_l, half, unused0, unused1):
    off = r_w - r_l - half
    return off * off, 2.0 * off, -2.0 * off


@triton.jit
def ipo_per_token(r_w, r_l, n_w, n_l, half, unused0, unused1):
    off = r_w / n_w - r_l / n_l - half
    return off * off, 2.0 * off / n_w, -2.0 * off / n_l


@triton.jit
def hinge(r_w, r_l, n_w, n_l, beta, unused0, unused1):
    off = 1.0 - beta * (r_w - r_l)
    d = tl.where(off > 0.0, beta, 0.0)
    return tl.maximum(off, 0.0), -d, d


@triton.jit
def robust(r_w, r_l, n_w, n_l, beta, smoothing, unused):
    z = beta * (r_w - r_l)
    value = (1.0 - smoothing) * _softplus(-z) - smoothing * _softplus(z)
    d = -(1.0 - smoothing) * _sigmoid(-z) - smoothing * _sigmoid(z)
    unbias = 1.0 / (1.0 - 2.0 * smoothing)
    return value * unbias, d * beta * unbias, -d * beta * unbias


@triton.jit
def exo(r_w, r_l, n_w, n_l, beta, log_right, log_wrong):
    z = beta * (r_w - r_l)
    right = -_softplus(-z) - log_right
    wrong = -_softplus(z) - log_wrong
    p = _sigmoid(z)
    q = _sigmoid(-z)
    d = p * q * (right - wrong)
    return p * right + q * wrong, d * beta, -d * beta


@triton.jit
def nca(r_w, r_l, n_w, n_l, beta, unused0, unused1):
    b_w = beta * r_w
    b_l = beta * r_l
    value = _softplus(-b_w) + 0.5 * _softplus(b_w) + 0.5 * _softplus(b_l)
    return value, beta * (0.5 * _sigmoid(b_w) - _sigmoid(-b_w)), 0.5 * beta * _sigmoid(b_l)


@triton.jit
def sppo(r_w, r_l, n_w, n_l, half, unused0, unused1):
    w = r_w - half
    l = r_l + half  # noqa: E741
    return w * w + l * l, 2.0 * w, 2.0 * l


@triton.jit
def apo_zero(r_w, r_l, n_w, n_l, beta, unused0, unused1):
    w = _sigmoid(-beta * r_w)
    l = _sigmoid(beta * r_l)  # noqa: E741
    return w + l, -beta * w * _sigmoid(beta * r_w), beta * l * _sigmoid(-beta * r_l)


@triton.jit
def apo_down(r_w, r_l, n_w, n_l, beta, unused0, unused1):
    z = beta * (r_w - r_l)
    up = _sigmoid(beta * r_w)
    apart = _sigmoid(-z)
    d = apart * _sigmoid(z) * beta
    return up + apart, beta * up * _sigmoid(-beta * r_w) - d, d


ALL = (
    dpop_inside,
    dpop_outside,
    dpop_additive,
    dpo,
    dpo_per_token,
    ipo,
    ipo_per_token,
    hinge,
    robust,
    exo,
    nca,
    sppo,
    apo_zero,
    apo_down,
)
"""Every one of them, for the registry."""

Options = Mapping[str, Any]
Choice = tuple[Any, tuple[float, float, float]]


def _dpop(o: Options) -> Choice:
    forms = {"inside": dpop_inside, "outside": dpop_outside, "additive": dpop_additive}
    return forms[o["form"]], (o["beta"], o["lam"], o["label_smoothing"])


def _ipo(o: Options) -> Choice:
    return (ipo_per_token if o["average"] else ipo), (1 / (2 * o["beta"]), 0.0, 0.0)


def _exo(o: Options) -> Choice:
    e = o["label_smoothing"]
    return exo, (o["beta"], math.log1p(-e), math.log(e))


def _of_beta(function: Any) -> Callable[[Options], Choice]:
    return lambda o: (function, (o["beta"], 0.0, 0.0))


BY_NAME: dict[str, Callable[[Options], Choice]] = {
    "DPOP": _dpop,
    "DPO": lambda o: (dpo, (o["beta"], o["label_smoothing"], 0.0)),
    "LengthNormalisedDPO": _of_beta(dpo_per_token),
    "IPO": _ipo,
    "Hinge": _of_beta(hinge),
    "RobustDPO": lambda o: (robust, (o["beta"], o["label_smoothing"], 0.0)),
    "EXO": _exo,
    "NCA": _of_beta(nca),
    "SPPO": lambda o: (sppo, (0.5 / o["beta"], 0.0, 0.0)),
    "APOZero": _of_beta(apo_zero),
    "APODown": _of_beta(apo_down),
}
"""The losses that have a kernel, by their class: the function and its numbers of their options."""


def jitted(name: str, options: Options) -> Choice | None:
    """The function and the numbers of a loss of :mod:`fastdpop.losses`, by its class and options;
    None where there is no kernel for it.
    """
    if name not in BY_NAME or options.get("divergence", "reverse_kl") != "reverse_kl":
        return None
    function, numbers = BY_NAME[name](options)
    first, second, third = (float(n) for n in numbers)
    return function, (first, second, third)
