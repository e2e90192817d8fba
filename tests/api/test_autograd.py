"""The graph around the loss: who gets gradients, when, how often, and by which route."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdpop import engines, fused_logps, fused_preference_loss, losses
from fastdpop.engines.eager import EagerEngine
from tests.batches import Batch, batch, fused, losses_by_definition

NAMES = ("hidden", "weight", "bias")


@pytest.mark.parametrize("name", ["dpop", "aot"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"]], ids=str)
def test_only_some_inputs_require_gradients(wanted: list[str], reduction: str, name: str) -> None:
    example = batch(3, dtype=torch.float64, bias=True)
    full = fused(example, name, reduction=reduction).loss.sum()
    want = dict(zip(NAMES, torch.autograd.grad(full, example.inputs), strict=True))
    for own, leaf in zip(NAMES, example.inputs, strict=True):
        leaf.requires_grad_(own in wanted)
    out = fused(example, name, reduction=reduction)
    out.loss.sum().backward()
    for own, leaf in zip(NAMES, example.inputs, strict=True):
        if own in wanted:
            torch.testing.assert_close(leaf.grad, want[own], rtol=1e-11, atol=1e-14)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached"])
def test_without_gradients(how: str) -> None:
    example = batch(3, bias=True)
    want = fused(example, "dpop").loss.detach()
    if how == "detached":
        for leaf in example.inputs:
            leaf.requires_grad_(False)
        out = fused(example, "dpop")
    else:
        with getattr(torch, how)():
            out = fused(example, "dpop")
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_accumulation(dtype: torch.dtype, trained: bool) -> None:
    """Two micro-batches whose sums are averaged are one batch."""
    example = batch(4, dtype=dtype, bias=True, trained=trained)
    fused(example, "dpop").loss.backward()
    want = [leaf.grad.clone() for leaf in example.trained if leaf.grad is not None]
    for leaf in example.trained:
        leaf.grad = None
    for part in ([0, 1, 4, 5], [2, 3, 6, 7]):
        micro = Batch(
            example.hidden[part],
            example.weight,
            example.bias,
            example.labels[part],
            example.ref_logps[part],
        )
        (fused(micro, "dpop", reduction="sum").loss / 4).backward()
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for leaf, grad in zip(example.trained, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=rtol, atol=1e-2 * rtol)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot"])
def test_a_loss_that_is_scaled_and_added_to_another(name: str, trained: bool) -> None:
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    definition = -0.7 * losses_by_definition(example, name).mean() + example.hidden.pow(2).sum()
    want = torch.autograd.grad(definition, example.trained)
    total = -0.7 * fused(example, name).loss + example.hidden.pow(2).sum()
    for a, b in zip(torch.autograd.grad(total, example.trained), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_loss_scaling_keeps_small_float16_gradients(trained: bool) -> None:
    """GradScaler's way: times 65536 before backward, divided out in float32 afterwards. Without it
    half of these gradients would be below float16's range.
    """
    example = batch(3, dtype=torch.float16, bias=True, trained=trained, scale=0.5)
    loss = losses.get("dpo", beta=1e-4)
    exact = torch.autograd.grad(
        losses_by_definition(wide := example.to(torch.float64), loss).mean(), wide.trained
    )
    (fused(example, loss).loss * 65536.0).backward()
    for leaf, want in zip(example.trained, exact, strict=True):
        assert leaf.grad is not None
        assert float(want.abs().max()) < 1e-4
        got = leaf.grad.double() / 65536.0
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot"])
def test_backward_twice(name: str, trained: bool) -> None:
    example = batch(3, bias=True, trained=trained)
    loss = fused(example, name).loss
    first = torch.autograd.grad(loss, example.trained, retain_graph=True)
    second = torch.autograd.grad(loss, example.trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, example.trained)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot"])
def test_second_derivatives_are_refused(name: str, trained: bool) -> None:
    example = batch(3, trained=trained)

    def curvature() -> None:
        loss = fused(example, name).loss
        (gradient,) = torch.autograd.grad(loss**2, example.hidden, create_graph=True)
        torch.autograd.grad(gradient.pow(2).sum(), example.hidden)

    with pytest.raises(RuntimeError, match=r"differentiation|no autograd formula"):
        curvature()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot", "kto"])
def test_repeated_runs_are_bitwise_equal(name: str, trained: bool, dtype: torch.dtype) -> None:
    example = batch(4, 30, 48, 301, dtype=dtype, bias=True, trained=trained)

    def run() -> list[Tensor]:
        out = fused(example, name, workspace_bytes=100_000, statistics=("entropy",))
        logged = [value for value in vars(out).values() if isinstance(value, Tensor)]
        return [*logged, *torch.autograd.grad(out.loss, example.trained)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_checkpointed_loss_is_the_loss() -> None:
    from torch.utils.checkpoint import checkpoint

    example = batch(3, bias=True)
    want = torch.autograd.grad(fused(example, "dpop").loss, example.trained)

    def run(hidden: Tensor) -> Tensor:
        own = Batch(hidden, example.weight, example.bias, example.labels, example.ref_logps)
        return fused(own, "dpop").loss

    loss = checkpoint(run, example.hidden, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, example.trained), want, strict=True):
        assert torch.equal(a, b)


def test_unused_gradients_are_freed_with_the_loss() -> None:
    """The gradients that the forward pass formed live no longer than the loss: no reference cycle
    waits for the garbage collector.
    """
    example = batch(3, bias=True)
    for name in ("dpop", "aot"):
        fused(example, name)

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for name in ("dpop", "aot"):
            out = fused(example, name)
            assert tensors() > before
            del out
        assert tensors() == before
    finally:
        gc.enable()


class Learnable(losses.PreferenceLoss):
    """A loss with a parameter of its own."""

    def __init__(self, scale: Tensor, couples_pairs: bool) -> None:
        self.scale = scale
        self.couples_pairs = couples_pairs

    @property
    def traits(self) -> losses.Traits:
        return losses.Traits(needs_reference=False, couples_pairs=self.couples_pairs)

    def __call__(self, pairs: losses.PairLogps) -> Tensor:
        return self.scale * (pairs.rejected - pairs.chosen)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_parameter_of_the_loss_gets_its_gradient_or_an_error(trained: bool) -> None:
    example = batch(3, dtype=torch.float64, trained=trained)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for loss in (Learnable(scale, True), Learnable(scale, True).__call__):
        out = fused(example, loss)
        (gradient,) = torch.autograd.grad(out.loss, scale)
        want = (out.rejected_logps - out.chosen_logps).mean()
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)
    if trained:
        with pytest.raises(ValueError, match="the loss holds a tensor that requires gradients"):
            fused(example, Learnable(scale, False))
        assert fused(example, Learnable(scale.detach(), False)).loss.requires_grad


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot"])
def test_uninitialised_memory_does_not_show(name: str, trained: bool) -> None:
    """`torch.empty` filled with NaN, on every route."""
    example = batch(3, bias=True, trained=trained)

    def run() -> list[Tensor]:
        out = fused(example, name, workspace_bytes=20_000, statistics=("entropy",))
        assert out.entropy is not None
        return [out.loss, out.entropy, *torch.autograd.grad(out.loss, example.trained)]

    want = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        got = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Recorder(EagerEngine):
    """The eager engine, noting what is asked of it."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def logps(self, *args):  # type: ignore[no-untyped-def]
        self.calls.append("logps")
        return super().logps(*args)

    def logps_and_dlogp_dhidden(self, *args):  # type: ignore[no-untyped-def]
        self.calls.append("logps_and_dlogp_dhidden")
        return super().logps_and_dlogp_dhidden(*args)

    def gradients(self, *args):  # type: ignore[no-untyped-def]
        self.calls.append("gradients")
        return super().gradients(*args)

    def logps_and_gradients(self, *args):  # type: ignore[no-untyped-def]
        self.calls.append("logps_and_gradients")
        return super().logps_and_gradients(*args)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    engine = Recorder()
    engines.register(engine, first=False)
    yield engine
    engines._ENGINES.pop(engine.name)


ONE_PASS = ["logps_and_gradients"]
DIRECTION = ["logps_and_dlogp_dhidden"]
TWO_PASSES = ["logps", "gradients"]


@pytest.mark.parametrize(
    ("loss", "options", "trained", "frozen"),
    [
        ("dpop", {}, ONE_PASS, DIRECTION),
        ("dpop", {"reduction": "sum", "statistics": ("entropy",)}, ONE_PASS, DIRECTION),
        ("dpop", {"reduction": "none"}, TWO_PASSES, DIRECTION),
        ("aot", {}, TWO_PASSES, DIRECTION),
        ("kto", {}, TWO_PASSES, DIRECTION),
        ("kto", {"kl": torch.tensor(0.1)}, ONE_PASS, DIRECTION),
        (losses.get("dpop") + losses.get("sft"), {}, ONE_PASS, DIRECTION),
        (losses.get("dpop") + losses.get("aot"), {}, TWO_PASSES, DIRECTION),
        (losses.wpo_weighted(losses.get("ipo")), {}, ONE_PASS, DIRECTION),
        (losses.pairwise(lambda pairs: -pairs.chosen), {}, ONE_PASS, DIRECTION),
        (lambda pairs: -pairs.chosen, {}, TWO_PASSES, DIRECTION),
    ],
    ids=lambda value: None,
)
def test_the_cheapest_route_is_taken(
    recorder: Recorder,
    loss: losses.PreferenceLoss,
    options: dict[str, object],
    trained: list[str],
    frozen: list[str],
) -> None:
    """What a call costs is what it asks of the engine: 6 units in one pass, 4 through the
    direction, 8 in two passes, 2 for log-probs alone.
    """
    for is_trained, want in ((True, trained), (False, frozen)):
        recorder.calls.clear()
        example = batch(3, trained=is_trained)
        fused(example, loss, engine="recorder", **options).loss.sum().backward()
        assert recorder.calls == want
    recorder.calls.clear()
    with torch.no_grad():
        fused(example, loss, engine="recorder", ref_hidden=example.hidden, **options)
    assert recorder.calls == ["logps", "logps"]


def test_the_routes_of_fused_logps(recorder: Recorder) -> None:
    for is_trained, want in ((True, TWO_PASSES), (False, DIRECTION)):
        recorder.calls.clear()
        example = batch(3, trained=is_trained)
        fused_logps(*example.inputs, example.labels, engine="recorder").sum().backward()
        assert recorder.calls == want


# PyTorch imports its own scripted functions for them.
func_warns = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

FUNC = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
}


@func_warns
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", FUNC)
def test_transforms_of_torch_func_are_refused(transform: str, trained: bool) -> None:
    """The operators would be plain numbers to them: forward-mode derivatives would be 0."""
    example = batch(2, trained=trained)

    def loss(hidden: Tensor) -> Tensor:
        given = (hidden, example.weight, example.labels)
        return fused_preference_loss(*given, ref_logps=example.ref_logps).loss

    def logps(hidden: Tensor) -> Tensor:
        return fused_logps(hidden, example.weight, example.labels).sum()

    for function in (loss, logps):
        with pytest.raises(NotImplementedError, match=r"torch\.func .*torch\.autograd\.grad"):
            FUNC[transform](function)(example.hidden.detach())


@func_warns
@pytest.mark.parametrize("of", ["hidden", "weight"])
def test_forward_mode_is_refused(of: str) -> None:
    example = batch(2)
    with torch.autograd.forward_ad.dual_level():
        given = {"hidden": example.hidden.detach(), "weight": example.weight.detach()}
        given[of] = torch.autograd.forward_ad.make_dual(given[of], torch.ones_like(given[of]))
        with pytest.raises(NotImplementedError, match=r"forward-mode .*torch\.autograd\.grad"):
            fused_logps(**given, labels=example.labels)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fused_preference_loss(**given, labels=example.labels, ref_logps=example.ref_logps)
