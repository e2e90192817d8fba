"""Every variant of every kernel that a launch can ask for, for compiling ahead of time.

    for variant in variants("sm_90a"):
        source = triton.compiler.ASTSource(variant.kernel, variant.signature, variant.constants, variant.attrs)
        triton.compile(source, target=.., options={"num_warps": variant.num_warps, ..})

Tile sizes and launches come from the table that the launchers read, and no argument specialises
(:func:`fastdpop.kernels.tiles.jit`), so what is compiled here is what runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from fastdpop.kernels import (
    combine,
    config,
    forward,
    gluon_forward,
    gradients,
    losses,
    pair_loss,
    repair,
    target_logit,
)
from fastdpop.kernels.config import Blocks, Config, Launch
from tools.kernels.variant import Variant

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Triton's names of the dtypes."""


# Types of arguments that are the same in every variant. Sizes fit 32 bits; where one is multiplied
# by another, the kernels widen it first.
_TYPES = {
    **dict.fromkeys(
        (
            "shift",
            "tile_sumexp",
            "tile_maximum",
            "target_logit",
            "statistics",
            "tile_statistics",
            "sumexp",
            "logps",
            "lse",
            "rest",
            "row_scale",
            "factor",
            "unit",
            "losses",
            "dlogp",
            "out",
        ),
        "*fp32",
    ),
    **dict.fromkeys(("ref_logps", "sequence_logps"), "*fp64"),
    **dict.fromkeys(("targets", "offsets", "order"), "*i64"),
    "num_active": "*i32",
    **dict.fromkeys(
        (
            "rows",
            "tile_count",
            "vocabulary",
            "width",
            "hidden_stride",
            "weight_stride",
            "kept_stride",
            "scaled_stride",
            "out_stride",
            "first_row",
            "first_pair",
            "pairs",
            "rounded",
            "stage",
            "again",
            "keep",
            "has_bias",
            "has_softcap",
            "has_statistics",
        ),
        "i32",
    ),
    **dict.fromkeys(("scale", "cap", "share", "number0", "number1", "number2"), "fp32"),
}


def variants(target: str) -> list[Variant]:
    """Every configuration shipped for a target.

    Raises:
        ValueError: the table has no such target.
    """
    if target not in config.TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(config.TARGETS)}")
    found: list[Variant] = []
    for dtype, name in NAMES.items():
        of = config.of(target, dtype)
        for part in (_forward, _repair, _combine, _gradients):
            found += part(target, name, of)
    found += _pair_losses(target)
    if target == "sm_90a":
        found += _gluon(target)
    return found


def _make(
    label: str,
    target: str,
    kernel: Any,
    launch: Launch,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
    **facts: Any,
) -> Variant:
    """A variant; `constants` has the arguments that it does without as None."""
    types = types or {}
    signature = {
        name: "constexpr" if name in constants else types.get(name) or _TYPES[name]
        for name in kernel.arg_names
    }
    options = launch.options()
    return Variant(
        name=label,
        kernel=kernel,
        signature=signature,
        constants={name: constants[name] for name in kernel.arg_names if name in constants},
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        target=target,
        default=facts.pop("default", True),
        options=options,
        **facts,
    )


def _label(kernel: str, flags: dict[str, bool], target: str, name: str, tile: str) -> str:
    chosen = "".join(f"_{flag.lower()}" for flag, on in flags.items() if on)
    return f"{kernel}{chosen}/{target}/{name}/{tile}"


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    """Every choice of these."""
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _absent(**present: bool) -> dict[str, None]:
    """Arguments that a variant does without, as constants."""
    return {name: None for name, there in present.items() if not there}


def _operand(name: str, rows: int, columns: int, use_tma: bool) -> str:
    return f"tensordesc<{name}[{rows}, {columns}]>" if use_tma else f"*{name}"


def forward_flags(name: str) -> Iterator[dict[str, bool]]:
    """The forward product's options that go together: rows are skipped only in recomputing what is
    kept, statistics are never computed twice, and float16 keeps only in its second pass.
    """
    for flags in _flags("KEEP", "BIAS", "SOFTCAP", "STATISTICS", "ACTIVE"):
        if flags["ACTIVE"] and (flags["STATISTICS"] or not flags["KEEP"]):
            continue
        if name == "fp16" and flags["KEEP"] and flags["STATISTICS"]:
            continue
        yield flags


def _forward(target: str, name: str, of: Config) -> Iterator[Variant]:
    """Targets' logits and the forward product."""
    pointers = {"hidden": f"*{name}", "weight": f"*{name}", "bias": f"*{name}"}
    for flags in _flags("ROUNDED", "BIAS", "SOFTCAP"):
        # Unrounded only where the dtype asks for more than a shift.
        if not flags["ROUNDED"] and name != "fp16":
            continue
        yield _make(
            _label("target_logit", flags, target, name, f"{config.TARGET_ROWS}"),
            target,
            target_logit.target_logit_kernel,
            config.SMALL,
            {
                "BLOCK_N": config.TARGET_ROWS,
                "BLOCK_H": config.TARGET_WIDTH,
                **flags,
                **_absent(bias=flags["BIAS"]),
            },
            pointers,
            default=not flags["BIAS"] and not flags["SOFTCAP"],
        )
    blocks, tma = of.forward, of.use_tma
    types = {
        **pointers,
        "hidden": _operand(name, blocks.n, blocks.h, tma),
        "weight": _operand(name, blocks.v, blocks.h, tma),
        "exp_logits": _operand(name, blocks.n, blocks.v // 4, tma),
    }
    for flags in forward_flags(name):
        yield _make(
            _label("forward", flags, target, name, blocks.name),
            target,
            forward.forward_kernel,
            blocks.launch,
            {
                **blocks.constants,
                "GROUP_N": of.group_n,
                "USE_TMA": tma,
                **flags,
                **_absent(
                    exp_logits=flags["KEEP"],
                    bias=flags["BIAS"],
                    statistics=flags["STATISTICS"],
                    num_active=flags["ACTIVE"],
                ),
            },
            types,
            default=not any(on for flag, on in flags.items() if flag != "KEEP"),
            warpgroup=name != "fp32",
        )


def _repair(target: str, name: str, of: Config) -> Iterator[Variant]:
    blocks = of.repair
    yield _make(
        f"repair/{target}/{name}/{blocks.name}",
        target,
        repair.repair_kernel,
        blocks.launch,
        {"TILE": of.forward.v, **blocks.constants, "SCAN": config.SCAN_ROWS},
        dict.fromkeys(("hidden", "weight", "exp_logits", "bias"), f"*{name}"),
    )


def _combine(target: str, name: str, of: Config) -> Iterator[Variant]:
    for flags in _flags("KEEP", "SOFTCAP", "STATISTICS"):
        # Without what is kept there is neither a dtype nor a slope.
        if not flags["KEEP"] and (flags["SOFTCAP"] or name != "fp32"):
            continue
        if name == "fp16" and flags["STATISTICS"]:
            continue
        yield _make(
            _label("combine", flags, target, name, f"{config.COMBINE_ROWS}"),
            target,
            combine.combine_kernel,
            config.SMALL,
            {
                "BLOCK_N": config.COMBINE_ROWS,
                "BLOCK_TILES": config.COMBINE_TILES,
                **flags,
                **_absent(
                    exp_logits=flags["KEEP"],
                    tile_statistics=flags["STATISTICS"],
                    statistics=flags["STATISTICS"],
                ),
            },
            {"exp_logits": f"*{name}"},
            default=not flags["SOFTCAP"] and not flags["STATISTICS"],
            float64=True,
        )


def _gradients(target: str, name: str, of: Config) -> Iterator[Variant]:
    yield from _dhidden(target, name, of, of.dhidden)
    yield from _dweight(target, name, of, of.dweight)
    for flags in _flags("ACCUMULATE"):
        yield _make(
            _label("dbias", flags, target, name, f"{config.BIAS_TOKENS}"),
            target,
            gradients.dbias_kernel,
            config.SMALL,
            {"BLOCK_N": config.BIAS_ROWS, "BLOCK_V": config.BIAS_TOKENS, **flags},
            {"exp_logits": f"*{name}"},
            default=False,
        )


def _dhidden(target: str, name: str, of: Config, blocks: Blocks) -> Iterator[Variant]:
    tma = of.use_tma
    for out, active in dict.fromkeys((("fp32", False), ("fp32", True), (name, False))):
        kernel = "dhidden" if out == "fp32" else "dlogp_dhidden"
        yield _make(
            _label(kernel, {"ACTIVE": active}, target, name, blocks.name),
            target,
            gradients.dhidden_kernel,
            blocks.launch,
            {
                **blocks.constants,
                "GROUP_N": of.group_n,
                "USE_TMA": tma,
                "DTYPE": {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[out],
                "ACTIVE": active,
                **_absent(num_active=active),
            },
            {
                "exp_logits": _operand(name, blocks.n, blocks.v, tma),
                "weight": _operand(name, blocks.v, blocks.h, tma),
                "out": _operand(out, blocks.n, blocks.h // 2, tma),
            },
            warpgroup=name != "fp32",
        )


def _dweight(target: str, name: str, of: Config, blocks: Blocks) -> Iterator[Variant]:
    tma = of.use_tma
    for flags in _flags("ACCUMULATE", "ACTIVE"):
        # In float16 gradients are recomputed always, and rows without a coefficient are skipped.
        if name == "fp16" and not flags["ACTIVE"]:
            continue
        yield _make(
            _label("dweight", flags, target, name, blocks.name),
            target,
            gradients.dweight_kernel,
            blocks.launch,
            {
                **blocks.constants,
                "GROUP_N": of.group_n,
                "USE_TMA": tma,
                **flags,
                **_absent(num_active=flags["ACTIVE"]),
            },
            {
                "exp_logits": _operand(name, blocks.n, blocks.v, tma),
                "scaled": _operand(name, blocks.n, blocks.h, tma),
                "out": _operand("fp32", blocks.v, blocks.h // 2, tma),
            },
            warpgroup=name != "fp32",
        )


def _pair_losses(target: str) -> Iterator[Variant]:
    for function in losses.ALL:
        yield _make(
            f"pair_loss_{function.__name__}/{target}/fp32/{config.PAIR_ROWS}",
            target,
            pair_loss.pair_loss_kernel,
            config.SMALL,
            {"LOSS": function, "BLOCK_N": config.PAIR_ROWS},
            default=function.__name__ in ("dpop_inside", "dpo"),
            float64=True,
        )


def _gluon(target: str) -> Iterator[Variant]:
    """The warp-specialised forward product, which softcap always gives a bias."""
    for name in ("bf16", "fp16"):
        for flags in forward_flags(name):
            if flags["SOFTCAP"] and not flags["BIAS"]:
                continue
            signature, constants, options = gluon_forward.variants_signature(
                name, **{flag.lower(): on for flag, on in flags.items()}
            )
            launch = dict(options)
            sizes = "x".join(str(constants[f"BLOCK_{size}"]) for size in "NVH")
            yield Variant(
                name=_label("gluon_forward", flags, target, name, sizes),
                kernel=gluon_forward.forward_kernel,
                signature=signature,
                constants=constants,
                num_warps=launch.pop("num_warps"),
                num_stages=launch.pop("num_stages"),
                target=target,
                default=False,
                warpgroup=True,
                gluon=True,
                options=launch,
            )
