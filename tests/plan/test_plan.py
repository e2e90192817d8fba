"""The plan's arithmetic, by hand, and its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen3NextConfig

from fastdpop.cli import main
from fastdpop.plan.hardware import GIB, GPUS, Cluster, parse
from fastdpop.plan.memory import Job, Setting, gathered, memory_of, standing
from fastdpop.plan.model import Lora, Model, read_config
from fastdpop.plan.settings import compare, settings_of
from fastdpop.plan.speed import Traffic, gather, traffic_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # asked for by peft

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
HEAD = 1000 * 64
ALL = 6 * LAYER + 2 * HEAD + 64


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model(LlamaConfig(**SIZES, tie_word_embeddings=False))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    LlamaConfig(**SIZES, tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def job(model: Model, gpus: int = 8, **options: Any) -> Job:
    return Job(model, Cluster(gpus, "H100", GPUS["H100"]), 2, 64, 32, **options)


def test_parameters(llama: Model) -> None:
    counts = llama.counts()
    assert (counts.all, counts.trained, counts.layers) == (ALL, ALL, 6 * LAYER)
    assert (counts.layer, counts.head, counts.embedding) == (LAYER, HEAD, HEAD)
    assert counts.head_trained
    norms = 13 * 64
    assert llama.counts(4).all == (ALL - norms) // 4 + norms
    assert llama.counts(4).reduced == 12  # after attention and after the feed-forward part


def test_parameters_of_an_adapter() -> None:
    pytest.importorskip("peft")
    model = Model(LlamaConfig(**SIZES, tie_word_embeddings=False), Lora(4, ("q_proj", "down_proj")))
    adapter = 6 * 4 * (64 + 64 + 128 + 64)
    counts = model.counts()
    assert (counts.all, counts.trained, counts.head_trained) == (ALL + adapter, adapter, False)
    # q_proj's B and down_proj's A are divided, as the dimension beside them is.
    assert model.counts(2).trained == 6 * 4 * (64 + 32 + 64 + 64)


def test_a_tied_head_is_counted_once() -> None:
    model = Model(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert model.counts().all == ALL - HEAD
    assert model.tied


def test_what_ranks_hold(llama: Model) -> None:
    mixed, bf16 = job(llama), job(llama, precision="bf16")
    ddp, fsdp = Setting("DDP", replicas=8), Setting("FSDP2", "weights", 8)
    zero = {name: Setting(name, name, 8, deepspeed=True) for name in ("optimizer", "gradients")}
    expected = {"weights": 4 * ALL, "optimizer": 8 * ALL, "reference": 0, "buffers": 4 * ALL}
    assert standing(mixed, ddp) == expected
    expected = {"weights": ALL / 2, "optimizer": ALL, "reference": 0, "buffers": 0}
    assert standing(mixed, fsdp) == expected
    assert standing(bf16, ddp)["optimizer"] == 4 * ALL
    assert standing(mixed, zero["gradients"])["weights"] == 2 * ALL
    assert standing(mixed, zero["gradients"])["optimizer"] == 12 * ALL / 8
    assert standing(job(llama, reference="live"), ddp)["reference"] == 2 * ALL
    assert standing(job(llama, reference="live"), fsdp)["reference"] == ALL / 4
    # Between two passes of a step there are gradients; ZeRO-2 has an eighth of them.
    twice = job(llama, accumulate=2)
    parts = {name: memory_of(twice, setting).parts for name, setting in zero.items()}
    assert parts["optimizer"]["gradients"] == 2 * ALL
    assert parts["gradients"]["gradients"] == 2 * ALL / 8
    assert memory_of(mixed, zero["optimizer"]).parts["gradients"] == 0


def test_gathered_weights(llama: Model) -> None:
    reshard = Setting("FSDP2", "weights", 8)
    assert gathered(job(llama), reshard) == (2 * HEAD, 10 * LAYER, 10 * LAYER)
    keep = Setting("FSDP2, no reshard", "weights", 8, reshard=False)
    assert gathered(job(llama), keep)[0] == 2 * (6 * LAYER + HEAD)
    assert gathered(job(llama), Setting("DDP", replicas=8)) == (0, 0, 0)


def test_bytes_on_the_links() -> None:
    cluster = Cluster(16, "H100", GPUS["H100"])
    assert gather(cluster, 1e9, 1, 1) == Traffic()
    inside = gather(cluster, 8e9, 8, 8)
    assert (inside.node, inside.network) == (7e9, 0)
    assert inside.seconds == pytest.approx(7e9 / 450e9 / 0.8)
    # Half of the bytes enter a node, through the links of its 8 GPUs.
    across = gather(cluster, 16e9, 16, 8)
    assert (across.node, across.network) == (15e9, 1e9)
    alone = gather(cluster, 8e9, 2, 1)
    assert (alone.node, alone.network, alone.seconds) == (0, 4e9, pytest.approx(4e9 / 50e9 / 0.8))


def test_traffic_of_a_step(llama: Model) -> None:
    def sent(setting: Setting, **options: Any) -> float:
        hidden, exposed = traffic_of(job(llama, **options), setting)
        return hidden.node + exposed.node

    part = 7 / 8
    fsdp = Setting("FSDP2", "weights", 8)
    assert sent(fsdp) == pytest.approx(3 * 2 * ALL * part)
    assert sent(fsdp, accumulate=4) == pytest.approx(12 * 2 * ALL * part)
    keep = Setting("FSDP2, no reshard", "weights", 8, reshard=False)
    assert sent(keep) == pytest.approx(2 * 2 * ALL * part)
    assert sent(keep, reference="live") == pytest.approx(3 * 2 * ALL * part)
    ddp = Setting("DDP", replicas=8)
    assert sent(ddp, accumulate=4) == pytest.approx(2 * 4 * ALL * part)
    tokens, both = 4 * 64, 12 + 12
    states = 2 * 2 * tokens * 64 * 7 / 8
    assert sent(Setting("TP 8", "weights", 1, tp=8)) == pytest.approx(states * (both + 2))


def test_settings_by_size(llama: Model) -> None:
    assert [s.name for s in settings_of(job(llama, 1))] == ["one GPU"]
    small = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, no reshard"]
    assert [s.name for s in settings_of(job(llama, 4))] == [*small, "TP 2 x FSDP2", "TP 4"]
    assert [s.name for s in settings_of(job(llama, 2, precision="bf16"))][:2] == ["DDP", "FSDP2"]
    large = {s.name: s for s in settings_of(job(llama, 64))}
    assert (large["HSDP"].shards, large["HSDP"].replicas) == (8, 8)
    assert all(s.data_ranks * s.tp == 64 for s in large.values())


def test_the_fastest_that_fits_is_first(llama: Model) -> None:
    found, left_out = compare(job(llama, tree=0.5))
    assert left_out == {"TP 8": "its num_key_value_heads, 4, cannot be divided by 8"}
    assert all(each.fits and each.most_pairs >= 2 for each in found)
    speeds = [each.pairs_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    by_name = {(e.setting.name, e.setting.shared): e for e in found}
    for name in ("DDP", "FSDP2"):
        assert by_name[name, True].pairs_per_second > by_name[name, False].pairs_per_second


def test_what_fits(llama: Model) -> None:
    """As many pairs as are said to fit, fit, and one more does not; what does not fit comes last."""
    narrow = job(llama, reserve=GPUS["H100"].memory - 7 * 2**20)
    found, _ = compare(narrow, checkpointing=False)
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    for each in found:
        assert each.fits == (each.most_pairs >= narrow.pairs)
        for pairs in (each.most_pairs, each.most_pairs + 1):
            if pairs:
                total = memory_of(narrow.with_pairs(pairs), each.setting).total
                assert (total <= narrow.room) == (pairs == each.most_pairs)


def test_models_of_other_kinds() -> None:
    """No list of names: layers of two kinds, experts, and a model without a tensor-parallel plan."""
    experts = MixtralConfig(**SIZES, num_local_experts=4)
    found, left_out = compare(job(Model(experts), precision="bf16"))
    assert "FSDP2" in {each.setting.name for each in found}
    assert all("moe" in why or "experts" in why for name, why in left_out.items() if "TP" in name)
    other = Model(GPT2Config(n_embd=64, n_head=4, n_layer=3, vocab_size=100))
    _, left_out = compare(job(other))
    assert "no tensor-parallel plan for gpt2" in left_out["TP 2 x FSDP2"]
    mixed = Qwen3NextConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2)
    assert len(set(Model(mixed).kinds)) == 2


@pytest.mark.parametrize(
    ("text", "gpus", "kind"),
    [("8xH100", 8, "H100"), ("h200", 1, "H200"), ("64 x a100-80gb", 64, "A100-80GB")],
)
def test_gpus(text: str, gpus: int, kind: str) -> None:
    cluster = parse(text)
    assert (cluster.gpus, cluster.kind) == (gpus, kind)
    assert cluster.nodes == -(-gpus // 8)


def test_gpus_of_ones_own() -> None:
    cluster = parse("4xMI300X", memory=192 * GIB, peak=1300e12)
    assert (cluster.kind, cluster.gpu.memory) == ("MI300X", 192 * GIB)
    assert parse("RTX 4090", link=1e9).gpu.link == 1e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gpus", "12xH100"],
            "--gpus is '12xH100', expected at most 8 GPUs, or whole nodes of 8",
        ),
        (["--gpus", "0xH100"], "--gpus is '0xH100', expected a number and a kind"),
        (["--gpus", "8xFOO"], "any other needs --gpu-memory and --peak"),
        (["--reference", "adapter"], "--reference is 'adapter', which needs --lora"),
        (["--lora-targets", "q_proj"], "--lora-targets is 'q_proj', which needs --lora"),
        (["--lora", "8", "--lora-targets", "foo"], "--lora-targets is 'foo': Target modules"),
        (
            ["--pairs", "x.jsonl", "--tree-share", "0.5"],
            "--tree-share is 0.5, but --pairs measures",
        ),
        (["--chat"], "--chat says how pairs are read, but there are no --pairs"),
    ],
)
def test_mistakes(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["plan", "--model", str(config), *options]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "which is no JSON"),
        ("{}", "field 'model_type' is 'None', expected a model of transformers"),
        ("[]", "field 'model_type' is 'none', expected a model of transformers"),
        ('{"model_type": "llama", "hidden_size": "sixteen"}', "is no configuration of llama: "),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "'num_hidden_layers' is 0"),
        ('{"model_type": "llama", "quantization_config": {}}', "a quantised model, which is not"),
    ],
)
def test_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="a folder with one, or a model of the Hub"):
        read_config(str(tmp_path / "nothing"))


def test_text(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "8xH100", "--tree-share", "0.5", "--steps", "1000"]
    assert main(["plan", "--model", str(config), *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Estimates, not measurements, for llama" in said
    assert f"{ALL:,} parameters" in said
    assert "shared prefixes" in said
    assert "TRL's chunks" in said
    assert "1,000 steps take" in said
    assert "Start it with: accelerate launch --num_processes 8" in said


def test_how_to_start(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "16xH100", "--lora", "8", "--lora-targets", "q_proj,v_proj"]
    assert main(["plan", "--model", str(config), *options, "--reference", "adapter"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--num_machines 2 --machine_rank N --main_process_ip HOST" in said
    assert "--lora-rank 8 --lora_target_modules q_proj v_proj --reference online ..." in said


def test_nothing_fits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "1xH100", "--gpu-memory", "0.5", "--reserve", "0.49"]
    assert main(["plan", "--model", str(config), *options]) == 1
    said = capsys.readouterr().out
    assert "Nothing fits." in said
    assert "Too large, and the largest part at the fullest moment:" in said


def test_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(config.parent), "--gpus", "H100", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == {"type": "llama", "parameters": ALL, "trained": ALL}
    (only,) = said["settings"]
    parts = sum(v for k, v in only["bytes"].items() if k not in ("moment", "total"))
    assert only["bytes"]["total"] == pytest.approx(parts)
    seconds = only["seconds"]
    assert seconds["step"] == pytest.approx(sum(v for k, v in seconds.items() if k != "step"))
    assert said["heads"][0]["head"] == "fastdpop"
