"""Every shipped configuration of every kernel, for compiling ahead of time.

    for variant in variants("sm_90a"):
        source = triton.compiler.ASTSource(variant.kernel, variant.signature, variant.constants, variant.attrs)
        triton.compile(source, target=.., options={"num_warps": variant.num_warps, ..})

Tile sizes and launches come from the table that the launchers read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import combine, config, forward, gradients, losses
from .config import Launch, Tiles
from .tiles import DTYPES

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration.

    Attributes:
        name: kernel, options, target, dtype and tile, joined by slashes.
        kernel: the jitted function.
        signature: Triton's type of every argument, "constexpr" for constants.
        constants: their values.
        attrs: what the launcher guarantees of arguments, as Triton's compiler takes it: 16-byte
            alignment of the tensors that it makes itself or has checked.
        num_warps, num_stages: launch options.
        target: one of :data:`.config.TARGETS`.
        default: whether a call without options beyond the common ones gets it.
        options: further launch options.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    target: str
    default: bool
    options: dict[str, Any] = field(default_factory=dict)


# Types of arguments whose type does not depend on the variant. Sizes fit 32 bits, or 64 where a
# size is multiplied by another before it reaches the kernel.
_TYPES = {
    **dict.fromkeys(
        (
            "tops",
            "totals",
            "target_logits",
            "moments",
            "logps",
            "lse",
            "rests",
            "row_tops",
            "logs",
            "shares",
            "statistics",
            "coefficients",
            "peak",
            "reference",
            "losses",
            "sums",
        ),
        "*fp32",
    ),
    **dict.fromkeys(("offsets", "order"), "*i64"),
    **dict.fromkeys(("live", "pieces", "counts"), "*i32"),
    **dict.fromkeys(
        (
            "rows",
            "columns",
            "vocabulary",
            "width",
            "hidden_stride",
            "weight_stride",
            "kept_stride",
            "first_row",
            "first_pair",
            "pairs",
        ),
        "i32",
    ),
    **dict.fromkeys(
        ("scale", "cap", "gain", "share", "lowest", "number0", "number1", "number2"), "fp32"
    ),
}
# Made by a launcher, or checked by it before descriptors are used.
_ALIGNED = {
    "tops",
    "totals",
    "target_logits",
    "moments",
    "logps",
    "lse",
    "rests",
    "row_tops",
    "logs",
    "shares",
    "statistics",
    "peak",
    "pieces",
    "counts",
    "kept",
}


def variants(target: str) -> list[Variant]:
    """Every configuration shipped for a target.

    Raises:
        ValueError: the table has no such target.
    """
    if target not in config.TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(config.TARGETS)}")
    result = [v for dtype in _NAMES for v in _of_dtype(target, dtype)]
    return result + list(_of_sums(target))


def _make(
    target: str,
    label: str,
    kernel: Any,
    launch: Launch,
    default: bool,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
) -> Variant:
    types = types or {}
    signature = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name) or _TYPES[name]
            if name in _ALIGNED and signature[name].startswith("*"):
                attrs[(i,)] = [["tt.divisibility", 16]]
    options = launch.options()
    return Variant(
        name=label,
        kernel=kernel,
        signature=signature,
        constants={name: constants[name] for name in kernel.arg_names if name in constants},
        attrs=attrs,
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        target=target,
        default=default,
        options=options,
    )


def _of_dtype(target: str, dtype: torch.dtype) -> Iterator[Variant]:
    """The products of a dtype and what is between them."""
    best, name = config.tiles(target, dtype), _NAMES[dtype]
    usual = dtype == torch.bfloat16
    described = (True, False) if best.descriptors else (False,)

    def label(kernel: str, tile: str) -> str:
        return f"{kernel}/{target}/{name}/{tile}"

    for descriptors in described:
        tiles = config.tiles(target, dtype, described=descriptors)
        main = tiles == best
        how = "" if main else "-pointers"
        for keep, extra in _forward_options(usual and main):
            kernel = "forward" + ("_keep" if keep else "") + "".join(f"_{e.lower()}" for e in extra)
            yield _make(
                target,
                label(kernel + how, tiles.name),
                forward.forward_kernel,
                tiles.forward,
                main and not extra,
                {
                    "ROWS": tiles.rows,
                    "TOKENS": tiles.tokens,
                    "DEPTH": tiles.depth,
                    "GROUP": tiles.group,
                    "DESCRIPTORS": descriptors,
                    "DTYPE": DTYPES[dtype],
                    "KEEP": keep,
                    **{flag: flag in extra for flag in ("BIAS", "SOFTCAP", "MOMENTS", "LIVE")},
                },
                {
                    "hidden": _operand(name, tiles.rows, tiles.depth, descriptors),
                    "weight": _operand(name, tiles.tokens, tiles.depth, descriptors),
                    "kept": _operand(name, tiles.rows, tiles.tokens // 2, descriptors and keep),
                    "bias": f"*{name}",
                    "targets": "*i64",
                },
            )
        yield from _gradients(target, dtype, tiles, main, how)
        yield from _between(target, dtype, tiles, main, how)


def _forward_options(all_of_them: bool) -> Iterator[tuple[bool, tuple[str, ...]]]:
    extras: tuple[tuple[str, ...], ...] = ((),)
    if all_of_them:
        extras = ((), ("BIAS",), ("SOFTCAP",), ("MOMENTS",), ("BIAS", "SOFTCAP", "MOMENTS"))
    for keep in (False, True):
        yield from ((keep, extra) for extra in extras)
    yield True, ("LIVE",)


def _operand(dtype: str, rows: int, columns: int, descriptors: bool) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if descriptors else f"*{dtype}"


def _gradients(
    target: str, dtype: torch.dtype, tiles: Tiles, main: bool, how: str
) -> Iterator[Variant]:
    name = _NAMES[dtype]
    descriptors = tiles.descriptors
    shared = {"TOKENS": tiles.tokens, "GROUP": tiles.group, "DESCRIPTORS": descriptors}
    # (label, result's dtype, coefficients, live rows first, listed)
    for kernel, out, coefficients, live, listed in (
        ("hidden", torch.float32, True, False, False),
        ("direction", dtype, False, False, False),
        ("hidden_live", torch.float32, True, True, False),
        ("hidden_listed", torch.float32, True, False, True),
    ):
        yield _make(
            target,
            f"{kernel}{how}/{target}/{name}/{tiles.hidden_name()}",
            gradients.hidden_kernel,
            tiles.hidden,
            main and not listed and not live,
            {
                **shared,
                "ROWS": tiles.hidden_rows,
                "WIDTH": tiles.hidden_width,
                "DEPTH": tiles.hidden_depth,
                "DTYPE": DTYPES[out],
                "COEFFICIENTS": coefficients,
                "LIVE": live,
                "LISTED": listed,
            },
            {
                "kept": _operand(name, tiles.hidden_rows, tiles.hidden_depth, descriptors),
                "weight": _operand(name, tiles.hidden_depth, tiles.hidden_width, descriptors),
                "out": _operand(
                    _NAMES[out], tiles.hidden_rows, tiles.hidden_width // 2, descriptors
                ),
            },
        )
    for kernel, add, live, listed in (
        ("weight_first", False, False, False),
        ("weight_add", True, False, False),
        ("weight_add_live", True, True, False),
        ("weight_add_listed", True, False, True),
    ):
        yield _make(
            target,
            f"{kernel}{how}/{target}/{name}/{tiles.weight_name()}",
            gradients.weight_kernel,
            tiles.weight,
            main and not listed,
            {
                **shared,
                "ROWS": tiles.weight_tokens,
                "WIDTH": tiles.weight_width,
                "DEPTH": tiles.weight_depth,
                "ADD": add,
                "LIVE": live,
                "LISTED": listed,
            },
            {
                "kept": _operand(name, tiles.weight_depth, tiles.weight_tokens, descriptors),
                "hidden": _operand(name, tiles.weight_depth, tiles.weight_width, descriptors),
                "out": _operand("fp32", tiles.weight_tokens, tiles.weight_width // 2, descriptors),
            },
        )


def _between(
    target: str, dtype: torch.dtype, tiles: Tiles, main: bool, how: str
) -> Iterator[Variant]:
    """The kernels that move memory only."""
    name = _NAMES[dtype]
    pointers = {"kept": f"*{name}", "hidden": f"*{name}", "targets": "*i64"}
    plain = {"LIVE": False}
    for kernel, function, constants in (
        (
            "place_targets",
            gradients.place_targets_kernel,
            {"TOKENS": tiles.tokens, "ROWS": config.TARGET_ROWS, "DTYPE": DTYPES[dtype]}
            | {"SOFTCAP": False, "WEIGH": True}
            | plain,
        ),
        (
            "shares",
            gradients.shares_kernel,
            {
                "TOKENS": tiles.tokens,
                "ROWS": config.COMBINE_ROWS,
                "TILES": config.COMBINE_TILES,
                "WEIGH": True,
                "RESCALED": False,
            },
        ),
        (
            "rescale",
            gradients.rescale_kernel,
            {"TOKENS": tiles.tokens, "ROWS": config.SCALE_ROWS},
        ),
        (
            "bias",
            gradients.bias_kernel,
            {
                "TOKENS": tiles.tokens,
                "WIDTH": min(config.SUM_WIDTH, tiles.tokens),
                "ROWS": config.SCALE_ROWS,
                "RESCALE": True,
                "ADD": True,
            }
            | plain,
        ),
    ):
        out = {"out": "*fp32"}
        yield _make(
            target,
            f"{kernel}{how}/{target}/{name}/{tiles.name}",
            function,
            config.SMALL,
            main and kernel != "bias",
            constants,
            pointers | out,
        )


def _of_sums(target: str) -> Iterator[Variant]:
    """Combination of partial sums, the pairs' losses and the lists: float32 all of them."""
    tiles = config.tiles(target, torch.bfloat16)
    sizes = {"ROWS": config.COMBINE_ROWS, "TILES": config.COMBINE_TILES}
    targets = {"targets": "*fp32"}
    block = f"{config.COMBINE_ROWS}x{config.COMBINE_TILES}"
    for moments in (False, True):
        yield _make(
            target,
            f"combine{'_moments' if moments else ''}/{target}/fp32/{block}",
            combine.combine_kernel,
            config.SMALL,
            not moments,
            {**sizes, "MOMENTS": moments, "LIVE": False},
            targets,
        )
    for function in losses.ALL:
        name = function.__name__
        yield _make(
            target,
            f"pair_loss_{name}/{target}/fp32/{block}",
            combine.pair_loss_kernel,
            config.SMALL,
            name in ("dpop_inside", "dpo"),
            {**sizes, "LOSS": function},
            targets,
        )
    for by_tile in (False, True):
        size = tiles.weight_depth if by_tile else tiles.hidden_rows
        yield _make(
            target,
            f"list_{'weight' if by_tile else 'hidden'}/{target}/fp32/{size}",
            gradients.list_kernel,
            config.SMALL,
            False,
            {
                "ROWS": size,
                "PER_TILE": tiles.tokens // tiles.weight_tokens,
                "BY_TILE": by_tile,
                "LIVE": False,
            },
        )
