"""The problems by which the Triton engine checks its kernels: small ones, whose answers plain torch knows
in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastdpop.engines.base import (
    NO_GRAD,
    STATISTICS,
    GroupLoss,
    NeedsGrad,
    PairLossPlan,
    Problem,
)
from fastdpop.engines.triton_pass import NOISE, ROOM, TritonPass
from fastdpop.kernels import config, losses, pair_loss
from fastdpop.transform import LogitTransform

LOGITS = {torch.float32: 3e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}
"""Bound on a logit's error, relative to the row's largest. Tensor cores cut what they add up, some
2**-23 at each of a few dozen steps, always towards 0.
"""

IMPROBABLE = -62.0
"""Targets of a smaller log-prob, 2**-90, overflow the sums of their rows, which are repaired."""

Results = dict[str, Tensor]
Bounded = dict[str, tuple[Tensor, Tensor]]
"""Values in float64, and bounds on the error of each; by the kernels that have formed them."""

FORWARD = "forward_kernel or combine_kernel: "
REPAIR = "repair_kernel: "
DIRECTION = "dhidden_kernel or cuBLAS, of what forward_kernel keeps: direction"
DHIDDEN = "dhidden_kernel or cuBLAS, of what forward_kernel keeps: dHidden"
DWEIGHT = "dweight_kernel or cuBLAS, of what forward_kernel keeps: dWeight"
DBIAS = "dbias_kernel, of what forward_kernel keeps: dBias"
ADDED = ", added to another"
LOSS = "pair_loss_kernel: loss"


@dataclass(frozen=True)
class Step:
    """A way through the kernels, with all that chooses variants of them.

    Attributes:
        route: a method of the pass: "forward_only", "dlogp_dhidden", "recompute", or "one_pass" of a
            group that fits the workspace; or "pair_loss".
        dtype: of the products; hidden: of the hidden states.
        loss: the pair loss's function.
    """

    route: str
    device: torch.device
    dtype: torch.dtype
    hidden: torch.dtype
    bias: bool = False
    softcap: bool = False
    statistics: bool = False
    needs_grad: NeedsGrad = NO_GRAD
    products: str = "auto"
    product: str = "plain"
    loss: Any = None


class RowsCase:
    """A small problem with the options of a step."""

    def __init__(self, step: Step, seed: int) -> None:
        self.step = step
        of = config.of(config.target_of(step.device), step.dtype)
        blocks = of.forward
        rows = max(2 * blocks.n, (of.dweight.stages + 1) * of.dweight.n) + 19
        vocabulary = max(2 * blocks.v, (of.dhidden.stages + 1) * of.dhidden.v) + 37
        if step.product == "gluon":
            # A program for each processor, and some that go on to a second tile.
            vocabulary += config.processors(step.device) * blocks.v // 2
        width = (blocks.stages + 2) * blocks.h + 24
        draw = torch.Generator("cpu").manual_seed(seed)

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")

        # Logits from -150 to 60; a softcap of 100 in their units.
        transform = LogitTransform(
            softcap=60.0 if step.softcap else None, logit_scale=1.5, temperature=0.6
        )
        weight = new(vocabulary, width) * (0.8 / width**0.5)
        targets = torch.randint(vocabulary, (rows,), generator=draw, device="cpu")
        targets[0], targets[-1] = 0, vocabulary - 1
        own = weight[targets]
        wished = torch.zeros_like(own[:, :1])
        wished[::7], wished[3::40], wished[5::40] = 30.0, -140.0, -100.0
        slope = transform.logit_scale / transform.temperature
        hidden = new(rows, width) + wished / (slope * own.square().sum(1, keepdim=True)) * own
        dlogp = new(rows)
        dlogp[1::3] = 0.0
        self.dlogp = dlogp.to(step.device)
        self.problem = Problem(
            hidden.to(step.device, step.hidden),
            weight.to(step.device, step.dtype),
            new(vocabulary).to(step.device, step.dtype) if step.bias else None,
            targets.to(step.device),
            [0, rows],
            transform,
            step.dtype,
            workspace_bytes=1 << 30,
        )

        self.hidden, self.weight = (
            m.to(step.dtype).double() for m in (self.problem.hidden, self.problem.weight)
        )
        u = self.hidden @ self.weight.T
        bias = self.problem.bias
        self.logits = transform.transform_(u if bias is None else u + bias.double())
        # Without the target among them: 1 - p of a token near certainty has to be exact.
        self.at = self.problem.targets[:, None]
        self.others = self.logits.scatter(1, self.at, -torch.inf)
        self.own = self.logits.gather(1, self.at)[:, 0]
        odds = self.others.logsumexp(1) - self.own
        self.logp = -torch.nn.functional.softplus(odds, threshold=500.0)
        self.lse = self.logits.logsumexp(1)

    def run(self) -> Results:
        """What the kernels make of it, in memory that is NaN where they do not write."""
        step, p, found = self.step, self.problem, Results()
        names = STATISTICS if step.statistics else ()
        run = TritonPass(p, names, step.needs_grad, step.products, step.product)
        if step.route == "forward_only":
            run.forward_only(run.everything)
        else:
            run.memory(len(p.targets)).fill_(torch.nan)
        if step.route == "dlogp_dhidden":
            found[DIRECTION] = torch.full_like(p.hidden, torch.nan)
            run.dlogp_dhidden(found[DIRECTION])
        elif step.route in ("one_pass", "recompute"):
            for total in (run.gradients.weight, run.gradients.bias):
                if total is not None:
                    total.fill_(torch.nan)
            for after in ("", ADDED):
                if step.route == "one_pass":
                    run.one_pass(GroupLoss(lambda *_: self.dlogp))
                else:
                    run.lse.copy_(self.lse)
                    run.recompute(run.everything, self.dlogp)
                for name, total in zip((DHIDDEN, DWEIGHT, DBIAS), run.gradients, strict=True):
                    if total is not None:
                        found[name + after] = total.clone()
        if step.route != "recompute":
            likely = self.logp > IMPROBABLE
            lines = (run.logps, run.lse, *run.statistics)
            for name, line in zip(("logp", "lse", *run.names), lines, strict=True):
                found[FORWARD + name], found[REPAIR + name] = line[likely], line[~likely]
        return found

    def exact(self) -> Bounded:
        """What it should be, and how far off the roundings of a kernel may take it."""
        step, p, found = self.step, self.problem, Bounded()
        error = LOGITS[step.dtype] * (1.0 + self.logits.abs().amax(1))
        rest = -torch.expm1(self.logp)
        if step.route != "recompute":
            lines = {
                "logp": (self.logp, 2 * error * rest + 2.0**-22 * self.logp.abs()),
                "lse": (self.lse, error),
            }
            if step.statistics:
                lines |= self._statistics(error)
            likely = self.logp > IMPROBABLE
            for name, (value, bound) in lines.items():
                found[FORWARD + name] = value[likely], bound[likely]
                found[REPAIR + name] = value[~likely], bound[~likely]

        # The derivative of each log-prob. What is kept of it is rounded, and so are its row's
        # factor, which is exact at the target, and for dWeight the factor times the hidden states.
        # What lies far below the rest of its row underflows in float16.
        g = (self.logits - self.lse[:, None]).exp_().scatter_(1, self.at, -rest[:, None]).neg_()
        p.transform.scale_by_slope_(g, self.logits.clone())
        unit = torch.finfo(step.dtype).eps / 2
        bounds = (g.abs() + 1e-6 * rest[:, None]) * (3 * unit + 4 * error[:, None])
        if step.dtype == torch.float16:
            bounds += self._underflow(rest)[:, None]
        c = self.dlogp.double()[:, None]
        dhidden = g @ self.weight, bounds @ self.weight.abs()
        if step.route == "dlogp_dhidden":
            out = torch.finfo(step.hidden).eps
            found[DIRECTION] = dhidden[0], dhidden[1] + out * dhidden[0].abs() + 1e-7
        if step.needs_grad.hidden:
            found[DHIDDEN] = c * dhidden[0], c.abs() * dhidden[1]
        for needed, name, x in (
            (step.needs_grad.weight, DWEIGHT, c * self.hidden),
            (step.needs_grad.bias, DBIAS, c),
        ):
            if needed:
                value, bound = (g.T @ x).squeeze(1), (bounds.T @ x.abs()).squeeze(1)
                found |= {name: (value, bound), name + ADDED: (2 * value, 2 * bound)}
        return found

    def _underflow(self, rest: Tensor) -> Tensor:
        """``(n,)`` what float16's smallest numbers are worth in each row's probabilities: where the others' part
        is less than is known of it beforehand, it does not fill the range.
        """
        noise = NOISE * (1.0 + self.lse.abs())
        return (rest.clamp_min(noise) + noise).clamp_max(1.0) * 2.0 ** (-24 - ROOM)

    def _statistics(self, error: Tensor) -> Bounded:
        """In the order of their names."""
        log_p = self.logits - self.lse[:, None]
        entropy = -(log_p.exp() * log_p).sum(1)
        lead = self.own - self.others.amax(1)
        lines = (
            (entropy, error * (1 + 2 * entropy)),
            (self.logits.mean(1), error),
            ((lead >= 0).double(), (lead.abs() < 2 * error).double()),
            (self.logp - (2 * log_p).logsumexp(1), 4 * error),
            (self.logits.amax(1), error),
        )
        return dict(zip(STATISTICS, lines, strict=True))


class PairsCase:
    """Pairs of sequences whose log-ratios float32 holds exactly, and a loss."""

    lengths = (300, 5, 3, 0, 1, 290, 40, 40, 2, 7)

    def __init__(self, step: Step, plan: PairLossPlan, seed: int) -> None:
        draw = torch.Generator("cpu").manual_seed(seed)
        self.device = step.device
        lengths = torch.tensor(self.lengths, device="cpu")
        self.count = len(lengths) // 2
        drawn = torch.randint(-512, 0, (int(lengths.sum()),), generator=draw, device="cpu")
        logps = drawn.to(torch.float32) / 512
        self.sums = torch.stack([part.sum() for part in logps.split(self.lengths)]).view(-1, 2)
        drawn = torch.randint(-512, 512, self.sums.shape, generator=draw, device="cpu")
        self.ratios = (drawn.double() + 0.25) / 256  # at no kink of a loss
        # With ordinary numbers: at extreme ones a loss saturates, and what is left of it is rounding.
        from fastdpop import losses as family  # which engines know nothing of

        kind = getattr(family, plan.loss)
        choices = {k: v for k, v in plan.options.items() if v is None or isinstance(v, (bool, str))}
        self.loss = kind(**choices)
        options = {f.name: getattr(self.loss, f.name) for f in fields(kind)}
        found = losses.jitted(plan.loss, options)
        assert found is not None
        assert found[0] is step.loss
        self.logps = logps.to(self.device)
        self.pairs = pair_loss.Pairs(
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(self.device),
            torch.arange(self.count, device="cpu").flip(0).to(self.device),
            (self.sums - self.ratios).flip(0).T.contiguous().to(self.device),
            True,
            *found,
            share=0.5,
        )

    def run(self) -> Results:
        """Loss, sums and derivatives by the kernel: the first pair by itself, then the others."""
        value = self.logps.new_full((self.count,), torch.nan)
        sums = self.logps.new_full((2 * self.count,), torch.nan, dtype=torch.float64)
        middle, dlogp = sum(self.lengths[:2]), torch.full_like(self.logps, torch.nan)
        for first, last, rows in ((0, 1, slice(0, middle)), (1, self.count, slice(middle, None))):
            dlogp[rows] = pair_loss.pair_loss(
                self.logps[rows], self.pairs, rows.start, first, last, value, sums
            )
        return {LOSS: value, LOSS + "'s sums": sums, LOSS + "'s derivatives": dlogp}

    def exact(self) -> Bounded:
        """By the package's own loss in float64; its derivatives by differences."""
        from fastdpop import losses as family

        tiny = 1e-5
        n = torch.tensor(self.lengths, dtype=torch.float64, device="cpu").view(-1, 2)
        zero, total = torch.zeros_like(n[:, 0]), n.new_tensor(len(n))
        there = zero == 0

        def value(w: float, l: float) -> Tensor:  # noqa: E741
            pairs = family.PairLogps(
                self.ratios[:, 0] + w, self.ratios[:, 1] + l, n[:, 0], n[:, 1], zero, zero, None,
                None, there, there, None, total, 2 * total, n[:, 0].sum(),
            )  # fmt: skip
            result: Tensor = self.loss(pairs)
            return result

        d_w, d_l = value(tiny, 0) - value(-tiny, 0), value(0, tiny) - value(0, -tiny)
        dlogp = 0.5 * torch.stack([d_w, d_l], dim=1).flatten() / (2 * tiny)
        found = {
            LOSS: value(0, 0).flip(0),
            LOSS + "'s sums": self.sums.double().flatten(),
            LOSS + "'s derivatives": dlogp.repeat_interleave(n.flatten().long()),
        }
        return {
            name: (
                x.to(self.device),
                (1e-4 * x.abs().amax() + 1e-12).expand(len(x)).to(self.device),
            )
            for name, x in found.items()
        }
