"""Small trainers to compare: TRL's own, and fastdpop's, from equal weights on equal data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from fastdpop.data.gsm8k import shipped_pairs
from fastdpop.integrations.trl.metrics import fill
from fastdpop.integrations.trl.models import on_fastdpop
from tests.tiny_model import tiny_llama, tiny_tokenizer

RELEASE = tuple(int(part) for part in trl.__version__.split(".")[:2])
WARNINGS = [
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory:UserWarning",
]
"""Of TRL and what it imports, in any of its versions."""


MONITOR = (
    *("ches", "ches_normalised", "logps/first_difference", "logps/after_difference"),
    "hinge_on",
)
"""Of these, all but the last have a meaning without a reference."""
OWN = ("penalty", "logratios/chosen", "logratios/rejected", *MONITOR)
"""What fastdpop logs and TRL does not."""


def pairs(count: int = 8, offset: int = 0) -> Dataset:
    """Sums, right and wrong, of many lengths."""
    numbers = [7 * (i + offset) + 3 for i in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": f"{n} + {n} = ",
                "chosen": f"{2 * n}" + ", of course" * (n % 3),
                "rejected": f"{2 * n + 1}" + "!" * (n % 4),
            }
            for n in numbers
        ]
    )


def stored(folder: Path) -> Dataset:
    """On disk, where log-probs are cached; TRL 1.8 can precompute them there only."""
    if not folder.exists():
        pairs().save_to_disk(folder)
    return load_from_disk(folder)


def gsm8k(count: int) -> Dataset:
    """Shortened, for a model of bytes."""
    return Dataset.from_list(
        [
            {
                "prompt": p["prompt"][-60:],
                "chosen": p["chosen"][:90],
                "rejected": p["rejected"][:90],
            }
            for p in shipped_pairs("train")[:count]
        ]
    )


def model(noise: float = 0.0, **options: Any) -> Any:
    """Always the same weights, apart from the noise."""
    made = tiny_llama(initializer_range=0.2, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return made


def arguments(folder: Path, config: Callable[..., Any] = DPOConfig, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "beta": 0.5,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
    }
    return config(**{**defaults, **options})


def trainer(
    kind: type[Any],
    folder: Path,
    *,
    policy: Any = None,
    reference: Any = "noisy",
    data: Any = None,
    config: Callable[..., Any] = DPOConfig,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer; `given` are its own arguments, `options` the config's."""
    return kind(
        model() if policy is None else policy,
        ref_model=model(noise=0.02) if reference == "noisy" else reference,
        args=arguments(folder, config, **options),
        train_dataset=pairs() if data is None else data,
        processing_class=tiny_tokenizer(),
        **(given or {}),
    )


def step(of: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Loss, gradients and metrics of the first batch, without a step of the optimizer."""
    of.model.zero_grad(set_to_none=True)
    of.model.train()
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    with of.compute_loss_context_manager():
        loss = of.compute_loss(of.model, batch)
    loss.backward()
    if on_fastdpop(of):
        fill(of, "train")  # as log() does
    return loss.detach(), gradients(of.model), dict(of._metrics["train"])


def gradients(of: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in of.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, theirs: Any) -> None:
    """Loss, gradients and metrics; fastdpop's own metrics are more."""
    (loss, gradient, metrics), (own_loss, own_gradient, own_metrics) = step(ours), step(theirs)
    torch.testing.assert_close(loss, own_loss, rtol=2e-5, atol=1e-6)
    assert gradient.keys() == own_gradient.keys()
    largest = max(value.abs().max().item() for value in own_gradient.values())
    assert largest > 0
    for name, value in gradient.items():
        torch.testing.assert_close(value, own_gradient[name], rtol=1e-3, atol=2e-5 * largest)
    assert set(metrics) == {*own_metrics, *OWN}
    assert_same_metrics(metrics, own_metrics)


def assert_same_metrics(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    """Those that are expected; there may be more."""
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.tensor(metrics[name], dtype=torch.float64),
            torch.tensor(value, dtype=torch.float64),
            rtol=2e-4,
            atol=1e-5,
        )


def namespace(of: type) -> dict[str, Any]:
    """The attributes of a class, without the note that Python leaves when an instance is copied."""
    return {name: value for name, value in vars(of).items() if name != "__slotnames__"}


def logged(of: Any, *names: str) -> list[tuple[float, ...]]:
    """Of every training step."""
    return [tuple(row[n] for n in names) for row in of.state.log_history if "grad_norm" in row]


__all__ = [
    "MONITOR",
    "OWN",
    "RELEASE",
    "WARNINGS",
    "DPOConfig",
    "DPOTrainer",
    "arguments",
    "assert_same_metrics",
    "assert_same_step",
    "gradients",
    "gsm8k",
    "logged",
    "model",
    "namespace",
    "pairs",
    "step",
    "stored",
    "trainer",
]
