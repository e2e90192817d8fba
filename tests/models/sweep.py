"""Every causal language model of transformers, attached and compared with its own full logits.

    python -m tests.models.sweep              # all, into docs/models.md
    python -m tests.models.sweep llama gpt2   # some, printed

Each model runs in a process of its own, 30 seconds of CPU time and 1 GiB at most.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdpop import attach, losses, naive
from fastdpop.hf.sharing_check import verdict_of
from tests.models.outcome import Outcome
from tests.models.page import page
from tests.models.shrink import LEFT_OUT, V, build

NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
SECONDS, BYTES = 30, 2**30
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

DPOP = losses.get("dpop", beta=0.3, lam=50.0)
LOGPS, LOSS, GRADIENTS = 2e-6, 2e-5, 2e-4
"""Allowed relative differences in fp32. The loss multiplies log-ratios by 15; gradients have gone through the trunk."""


def compare(name: str) -> Outcome:
    """Loss, log-probs and the gradient of every parameter, with `attach` and from the model's own logits.

    Raises:
        AssertionError: they differ.
    """
    torch.manual_seed(0)
    model = build(name)
    ids = torch.randint(3, V, (4, 9))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, -2:] = -100
    inputs = {"input_ids": ids, "use_cache": False}

    own = _logps(model(**inputs).logits, labels)
    # Two pairs below and above the reference, so that DPOP's penalty is on in one.
    ref_logps = own.detach() + torch.tensor([1.0, -1.0, 0.5, 0.5])
    router_loss = _router_loss(model, inputs | {"labels": labels})
    expected = naive.dpop_loss(own, ref_logps) + router_loss
    expected.backward()
    expected_gradients = _gradients(model)
    model.zero_grad()

    out = attach(model)(**inputs, labels=labels, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.logps, own.detach(), rtol=LOGPS, atol=0.0)
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=LOSS, atol=0.0)
    _check_gradients(_gradients(model), expected_gradients)
    head = _kind_of_head(model, inputs)
    return Outcome(name, None, bool(router_loss), head, *share(build(name)))


def share(model: nn.Module) -> tuple[str, str]:
    """Loss, log-probs and gradients with prefixes shared, against those without; how they are shared, and why not more.

    Raises:
        AssertionError: they differ.
    """
    torch.manual_seed(1)
    ids = torch.randint(3, V, (4, 24))
    ids[2:, :17] = ids[:2, :17]
    mask = torch.ones_like(ids)
    mask[1, -2:], mask[2, -4:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :12] = -100
    # The router's loss counts tokens, of which there are fewer.
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    attach(model)
    ref_logps = model(**call, return_logps=True).logps.detach() + torch.tensor(
        [1.0, -1.0, 0.5, 0.5]
    )
    found = []
    for shared in (False, True):
        model.zero_grad()
        options = {"share_prefixes": shared}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = model(
                **call,
                preference=DPOP,
                ref_logps=ref_logps,
                preference_options=options,
                router_loss_weight=0.0,
            )
        out.loss.backward()
        found.append((out, {name: g.clone() for name, g in _gradients(model).items()}))
    _check_equal(*found)
    known = verdict_of(model)
    reasons = [str(w.message) for w in said if "share_prefixes" in str(w.message)]
    return (
        (known.mode, known.reason) if known else ("padded", reasons[0].partition(", because ")[2])
    )


def _check_equal(unshared: Any, shared: Any) -> None:
    (expected, expected_gradients), (out, gradients) = unshared, shared
    torch.testing.assert_close(out.logps, expected.logps, rtol=LOGPS, atol=0.0)
    torch.testing.assert_close(out.loss.double(), expected.loss.double(), rtol=LOSS, atol=0.0)
    _check_gradients(gradients, expected_gradients)


def _check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = found.keys() ^ expected.keys()
    assert not different, f"parameters with a gradient in one of the two: {sorted(different)}"
    # A parameter whose exact gradient is 0 (a key's bias) has rounding errors of the others' size.
    every = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for parameter, gradient in expected.items():
        error = (found[parameter] - gradient).norm() / (gradient.norm() + 1e-3 * every)
        assert error <= GRADIENTS, f"the gradient of {parameter} is off by {error:.2g}"


def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return (logps * (targets != -100)).sum(-1)


def _router_loss(model: nn.Module, inputs: dict[str, object]) -> Tensor:
    """What a mixture of experts adds to its own loss."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return torch.zeros(())
    on, off = (model(**inputs, output_router_logits=on).loss for on in (True, False))
    return on - off


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _kind_of_head(model: nn.Module, inputs: dict[str, object]) -> tuple[str, ...]:
    from fastdpop.hf.interception import lazy_logits_from

    head = model.get_output_embeddings()
    with lazy_logits_from(head, None), torch.no_grad():
        product = model.__class__.forward(model, **inputs).logits.product
    kinds = {
        "tied": head.weight is model.get_input_embeddings().weight,
        "bias": product.bias is not None,
        "softcap": product.softcap is not None,
        "scale": product.softcap is None and product.scale != 1.0,
        "a factor for each token": product.weight.shape == head.weight.shape
        and product.weight.data_ptr() != head.weight.data_ptr(),
    }
    return tuple(kind for kind, present in kinds.items() if present)


# ---- a process for each model -------------------------------------------------------------------


def sweep(
    names: tuple[str, ...],
    jobs: int,
    task: Callable[[str], Outcome] = compare,
    seconds: int = SECONDS,
    size: int = BYTES,
) -> Iterator[Outcome]:
    """Outcomes in the order of `names`, `jobs` models at a time."""
    # Forked, so that torch and transformers are imported once.
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            name = waiting.pop(0)
            child = context.Process(target=_limited, args=(task, name, theirs, seconds, size))
            child.start()
            theirs.close()
            running.append((name, child, ours, time.monotonic() + 10 * seconds))
        name, child, pipe, deadline = running.pop(0)
        outcome = Outcome(name, f"took more than {seconds} seconds of CPU time")
        # CPU time is limited by the kernel; the deadline is for a process that sleeps.
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            with contextlib.suppress(EOFError):
                outcome = pipe.recv()
        child.kill()
        child.join()
        yield outcome


def _limited(
    task: Callable[[str], Outcome], name: str, pipe: Connection, seconds: int, size: int
) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + size, data + size))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds))
    try:
        outcome = task(name)
    except Exception as error:
        outcome = Outcome(name, f"{type(error).__name__}: {' '.join(str(error).split())}")
    pipe.send(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="types of model; all, and the page, without any")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for outcome in sweep(tuple(options.names) or NAMES, options.jobs):
        outcomes.append(outcome)
        print(
            f"{outcome.name:28}{outcome.error or 'right'}; {outcome.sharing} {outcome.reason}",
            flush=True,
        )
    unexpected = [o.name for o in outcomes if (o.error is None) == (o.name in LEFT_OUT)]
    if unexpected:
        print(f"not as LEFT_OUT in tests/models/shrink.py has it: {', '.join(unexpected)}")
    if not options.names:
        PAGE.write_text(page(outcomes))
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
