"""The check of compiled kernels: it passes on good ones, and no planted fault gets through."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from fastdpop import losses
from fastdpop.engines import Problem, self_check
from fastdpop.engines.base import NeedsGrad, PairLossPlan
from fastdpop.engines.self_check import Step
from fastdpop.engines.triton_pass import TritonPass
from fastdpop.kernels import combine, gradients, pair_loss, repair
from fastdpop.kernels import losses as jitted_losses
from fastdpop.transform import LogitTransform

CPU = torch.device("cpu")
ALL, NONE = NeedsGrad(True, True, False), NeedsGrad(False, False, False)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRADIENTS = Step("recompute", CPU, BF16, BF16, needs_grad=ALL)
LOGPS = Step("forward_only", CPU, FP32, FP32)


def a_plan(name: str = "dpop", **options: Any) -> PairLossPlan:
    loss = losses.get(name, **options)
    nothing = torch.zeros(0)
    fields = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}  # type: ignore[arg-type]
    return PairLossPlan(nothing, nothing, nothing, True, type(loss).__name__, fields, 1.0)


def of_plan(plan: PairLossPlan) -> Step:
    found = jitted_losses.jitted(plan.loss, plan.options)
    assert found is not None
    return Step("pair_loss", CPU, FP32, FP32, loss=found[0])


def a_pass(
    groups: tuple[int, ...] = (0, 4),
    dtype: torch.dtype = FP32,
    workspace: int = 1 << 20,
    statistics: tuple[str, ...] = (),
    softcap: float | None = None,
    needs_grad: NeedsGrad = NONE,
) -> TritonPass:
    problem = Problem(
        torch.zeros(groups[-1], 16, dtype=dtype),
        torch.zeros(40, 16, dtype=dtype),
        None,
        torch.zeros(groups[-1], dtype=torch.int64),
        list(groups),
        LogitTransform(softcap=softcap),
        dtype,
        workspace,
    )
    return TritonPass(problem, statistics, needs_grad, "auto", "plain")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """A process with a compiler that has checked nothing; what it checks."""
    seen: list[Step] = []
    monkeypatch.setattr(self_check, "compiled", lambda: True)
    monkeypatch.setattr(self_check, "_checked", set())
    monkeypatch.setattr(self_check, "check", lambda step, plan: seen.append(step))
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    return seen


@pytest.mark.parametrize(
    "step",
    [
        Step("one_pass", CPU, FP32, FP32, statistics=True, needs_grad=ALL, products="kernels"),
        Step("one_pass", CPU, BF16, BF16, True, True, True, NeedsGrad(True, True, True)),
        Step("one_pass", CPU, FP16, FP16, bias=True, needs_grad=NeedsGrad(False, True, True)),
        Step("recompute", CPU, BF16, FP32, softcap=True, needs_grad=ALL),
        Step("dlogp_dhidden", CPU, FP16, FP32, softcap=True),
        Step("dlogp_dhidden", CPU, BF16, BF16, bias=True, products="kernels"),
        Step("forward_only", CPU, FP16, FP16, True, True, True),
        LOGPS,
    ],
    ids=lambda step: f"{step.route}-{step.dtype}",
)
def test_good_kernels_pass(step: Step) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        self_check.check(step)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are its own"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "plan",
    [
        a_plan(),
        a_plan(lam=5000.0, beta=3.0),
        a_plan(form="outside"),
        a_plan(form="additive"),
        *map(a_plan, ("dpo", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair")),
        *map(a_plan, ("sppo_hard", "apo_zero", "apo_down")),
        a_plan("ipo", average=False),
        # Where values saturate or cancel: that is not the kernel's fault.
        a_plan("exo_pair", beta=30.0),
        a_plan("exo_pair", beta=1e-3, label_smoothing=0.49),
        a_plan("dpo", beta=1e-4, label_smoothing=0.4999),
    ],
    ids=lambda plan: plan.loss,
)
def test_good_pair_losses_pass(plan: PairLossPlan) -> None:
    self_check.check(of_plan(plan), plan)


Fault = Callable[[Callable[..., Any]], Callable[..., Any]]


def tile_unwritten(stale: float) -> Fault:
    """dWeight without one tile, which keeps what was there, or gets a number."""

    def plant(real: Callable[..., None]) -> Callable[..., None]:
        def faulty(e: Any, hidden: Any, factor: Any, out: torch.Tensor, *a: Any, **k: Any) -> None:
            before = out[16:32, 32:64].clone()
            real(e, hidden, factor, out, *a, **k)
            out[16:32, 32:64] = before if stale != stale else stale

        return faulty

    return plant


def row_block_missing(real: Callable[..., None]) -> Callable[..., None]:
    def faulty(e: Any, hidden: torch.Tensor, *a: Any, **k: Any) -> None:
        hidden = hidden.clone()
        hidden[16:32] = 0.0
        real(e, hidden, *a, **k)

    return faulty


def vocabulary_step_missing(real: Callable[..., None]) -> Callable[..., None]:
    def faulty(e: torch.Tensor, *a: Any, **k: Any) -> None:
        e = e.clone()
        e[:, 48:64] = 0.0
        real(e, *a, **k)

    return faulty


def target_entry_missing(real: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(done: Any, targets: torch.Tensor, *a: Any, **k: Any) -> Any:
        result = real(done, targets, *a, **k)
        if done.exp_logits is not None:
            done.exp_logits[8, targets[8]] = 0.0
        return result

    return faulty


def logps_off(real: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(*a: Any, **k: Any) -> Any:
        result = real(*a, **k)
        result.logps.mul_(1.0 + 1e-4)
        return result

    return faulty


def varying(real: Callable[..., None]) -> Callable[..., None]:
    """A few last bits of dWeight that differ from call to call, far below any bound."""
    calls = itertools.count()

    def faulty(e: Any, hidden: Any, factor: Any, out: torch.Tensor, *a: Any, **k: Any) -> None:
        real(e, hidden, factor, out, *a, **k)
        out[5].mul_(1.0 + 2.0**-20 * (next(calls) % 7))

    return faulty


def derivatives_cut(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def faulty(*a: Any, **k: Any) -> torch.Tensor:
        dlogp = real(*a, **k)
        dlogp[256:] = 0.0
        return dlogp

    return faulty


def nothing(real: Callable[..., None]) -> Callable[..., None]:
    return lambda *a, **k: None


def bias_swapped(real: Callable[..., None]) -> Callable[..., None]:
    def faulty(e: Any, factor: Any, out: torch.Tensor, **k: Any) -> None:
        real(e, factor, out, **k)
        out[[0, 1]] = out[[1, 0]]

    return faulty


WITH_BIAS = dataclasses.replace(GRADIENTS, bias=True, needs_grad=NeedsGrad(False, False, True))


@pytest.mark.parametrize(
    ("module", "name", "fault", "step", "message"),
    [
        (gradients, "weight_gradient", tile_unwritten(torch.nan), GRADIENTS, "dWeight is off"),
        (gradients, "weight_gradient", tile_unwritten(0.0), GRADIENTS, "dWeight is off"),
        (gradients, "weight_gradient", row_block_missing, GRADIENTS, "dWeight is off"),
        (gradients, "weight_gradient", varying, GRADIENTS, "dWeight differs between two runs"),
        (gradients, "hidden_gradient", vocabulary_step_missing, GRADIENTS, "dHidden is off"),
        (combine, "combine", target_entry_missing, GRADIENTS, "dHidden is off at .*dWeight is off"),
        (gradients, "bias_gradient", bias_swapped, WITH_BIAS, "dBias is off at 2 of"),
        (repair, "repair", nothing, LOGPS, "repair_kernel: logp is off"),
        (combine, "combine", logps_off, LOGPS, "forward_kernel or combine_kernel: logp is off"),
        (pair_loss, "pair_loss", derivatives_cut, None, "pair_loss_kernel: loss's derivatives is"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    fault: Fault,
    step: Step | None,
    message: str,
) -> None:
    plan = None
    if step is None:
        plan = a_plan()
        step = of_plan(plan)
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(RuntimeError, match=message) as error:
        self_check.check(step, plan)
    said = str(error.value)
    assert f"triton {triton.__version__} and ptxas none" in said
    assert "on cpu (interpreter)" in said
    assert "engine='eager'; FASTDPOP_SELF_CHECK=0" in said
    assert str(step.dtype) in said


def test_once_a_process_for_each_set(checks: list[Step]) -> None:
    for _ in range(2):
        self_check.ensure(a_pass(), "forward_only")
        self_check.ensure(a_pass(groups=(0, 3, 9)), "forward_only")
    assert checks == [LOGPS]
    self_check.ensure(a_pass(dtype=BF16), "forward_only")
    self_check.ensure(a_pass(softcap=30.0), "forward_only")
    self_check.ensure(a_pass(statistics=("entropy",)), "forward_only")
    self_check.ensure(a_pass(), "dlogp_dhidden")
    self_check.ensure(a_pass(needs_grad=ALL), "recompute")
    assert len({*checks}) == len(checks) == 6


def test_one_pass_checks_the_ways_it_goes(checks: list[Step]) -> None:
    plan = a_plan()

    def routes(run: TritonPass, plan: PairLossPlan | None = None) -> list[str]:
        checks.clear()
        self_check._checked.clear()
        self_check.ensure(run, "one_pass", plan)
        return [step.route for step in checks]

    assert routes(a_pass()) == ["one_pass"]
    assert routes(a_pass(), plan) == ["one_pass", "pair_loss"]
    assert routes(a_pass(), dataclasses.replace(plan, loss="KTO")) == ["one_pass"]
    assert routes(a_pass(workspace=1)) == ["forward_only", "recompute"]
    assert routes(a_pass((0, 1, 5), workspace=1)) == ["one_pass", "forward_only", "recompute"]
    assert routes(a_pass(dtype=FP16)) == ["forward_only", "recompute"]
    assert routes(a_pass((0, 0))) == []


def test_a_failed_check_is_not_forgotten(
    checks: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: Step, plan: PairLossPlan | None) -> None:
        raise RuntimeError("wrong")

    monkeypatch.setattr(self_check, "check", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="wrong"):
            self_check.ensure(a_pass(), "forward_only")


def test_nothing_is_checked_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Step] = []
    monkeypatch.setattr(self_check, "check", lambda step, plan: seen.append(step))
    self_check.ensure(a_pass(), "forward_only")
    assert seen == []


def test_the_environment_turns_it_off(checks: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.VARIABLE, "0")
    self_check.ensure(a_pass(), "forward_only")
    assert checks == []
    monkeypatch.setenv(self_check.VARIABLE, "off")
    with pytest.raises(ValueError, match="FASTDPOP_SELF_CHECK is 'off', expected 0 or 1"):
        self_check.ensure(a_pass(), "forward_only")
    monkeypatch.setenv(self_check.VARIABLE, "1")
    self_check.ensure(a_pass(), "forward_only")
    assert checks == [LOGPS]


def test_it_waits_for_the_end_of_a_capture(
    checks: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(self_check, "combination", lambda device: ("sm_90a", "12.8.93"))
    due = self_check._due
    monkeypatch.setattr(self_check, "_due", lambda device: due(gpu))
    self_check.ensure(a_pass(), "forward_only")
    assert checks == []
    assert not self_check._checked
    capturing[0] = False
    self_check.ensure(a_pass(), "forward_only")
    assert checks == [LOGPS]


def test_verified_combinations_are_trusted(
    checks: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "VERIFIED", frozenset({("sm_80", "12.8.93")}))
    self_check.ensure(a_pass(), "forward_only")
    assert checks == [LOGPS]
    self_check._checked.clear()
    monkeypatch.setattr(self_check, "VERIFIED", frozenset({self_check.combination(CPU)}))
    self_check.ensure(a_pass(), "forward_only")
    assert checks == [LOGPS]


@pytest.mark.parametrize(("capability", "target"), [((8, 6), "sm_86"), ((9, 0), "sm_90a")])
def test_a_combination_is_the_chip_and_its_own_ptxas(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], target: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = self_check.combination.__wrapped__(torch.device("cuda", 0))
    assert found == (target, self_check.ptxas_version(10 * capability[0] + capability[1]))
    assert re.fullmatch(r"\d+\.\d+\.\d+", found[1])
