"""The recipes fit on 8 H100s by fastdpop's own plan, as the table in RECIPES.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("trl")

from fastdpop.plan import Job, Lora, Model, Setting, hardware, read_config
from fastdpop.plan.settings import estimate
from recipes.smaug import stages

RECIPES = Path(stages.__file__).parent
TABLE = (RECIPES / "RECIPES.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries, about each other
FSDP2 = Setting("FSDP2", "weights", 8, checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "setting"),
    [("7b", Setting("DDP", replicas=8, checkpointing=True)), ("34b", FSDP2), ("72b", FSDP2)],
)
def test_the_table_is_the_plans(size: str, setting: Setting) -> None:
    recipe = stages.read(RECIPES / f"{size}.yaml")
    options, adapter = recipe.stages[-1].options, recipe.stages[0].options
    job = Job(
        Model(read_config(str(stages.FIXTURES / recipe.model)), Lora(adapter["lora_r"])),
        hardware.parse("8xH100"),
        options["per_device_train_batch_size"],
        length=options["max_length"],
        completion=512,
        reference="adapter",
        accumulate=options["gradient_accumulation_steps"],
    )
    found = estimate(job, setting)
    assert found.fits
    cells = re.search(rf"^\| {size.upper()} \|(.*)\|$", TABLE, re.MULTILINE)[1].split("|")  # type: ignore[index]
    _, memory, most, seconds, hours, *_ = (cell.strip() for cell in cells)
    # The last digit may follow the versions of the libraries whose code is traced.
    assert float(memory) == pytest.approx(found.memory.total / 2**30, abs=0.3)
    assert int(most) == pytest.approx(found.most_pairs, abs=1)
    assert float(seconds) == pytest.approx(found.step.seconds, rel=0.01)
    routine = {"7b": 2000}.get(size, 1000) * found.step.seconds / 3600
    assert float(hours) == pytest.approx(routine, abs=0.06)
