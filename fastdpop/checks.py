"""Checks of what a caller passes; every message names the argument, its value and what was
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpop import instead
from fastdpop.names import hint

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(instead.of_no_tensor(name, value, "a torch.Tensor"))
    return value


def _shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}: {meaning}"
        )


def _device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}, where hidden is")


def _unrounded(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}, expected floating point")
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has dtype {value.dtype}, in which it is rounded, expected torch.float32 or torch.float64, as it "
            "was computed. If FSDP's mixed precision has cast what forward was given, wrap it in fastdpop.exact"
        )


def flag(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        meant = hint(value, [each for each in allowed if isinstance(each, str)])
        raise ValueError(f"{name} is {value!r}, expected one of {tuple(allowed)}{meant}")


def statistics(names: object, allowed: Sequence[str]) -> None:
    """A sequence of statistics' names."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"statistics is {names!r}, expected a sequence of names among {tuple(allowed)}"
        )
    for name in names:
        if name not in allowed:
            among = f"expected names among {tuple(allowed)}{hint(name, allowed)}"
            raise ValueError(f"statistics contains {name!r}, {among}")


def no_transform(*tensors: Tensor | None) -> None:
    """Backward mode, and no transform of torch.func around the call.

    The operators would take the latter for plain tensors, and give forward-mode derivatives of 0.
    """
    if torch.compiler.is_compiling():
        return  # an operator without a rule stops the compiler
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if torch._C._functorch.peek_interpreter_stack() is not None or any(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in given
    ):
        raise NotImplementedError(
            "fastdpop does not work inside torch.func (grad, vjp, jvp, jacrev, hessian, vmap): call "
            "loss.backward() or torch.autograd.grad on its result; for second derivatives and "
            "Jacobians, fastdpop.naive has the same log-probs in plain torch"
        )
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise NotImplementedError(
            "fastdpop has no forward-mode derivatives: use loss.backward() or torch.autograd.grad, "
            "or fastdpop.naive, which has the same log-probs in plain torch"
        )


def batch(
    hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    hidden_index: Tensor | None = None,
    empty: bool = False,
) -> None:
    """Hidden states, labels, bounds and places fit together; where others have pairs, there may be none (`empty`)."""
    _tensor("hidden", hidden)
    _tensor("labels", labels)
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden has dtype {hidden.dtype}, expected one of {FLOATS}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(instead.of_labels(labels))
    _device("labels", labels, hidden.device)
    if hidden_index is not None:
        _places(hidden_index, hidden, labels)
    if cu_seqlens is None:
        if hidden.dim() != 3 and hidden_index is None:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}, expected (sequences, T, H), "
                "or packed (positions, H) with cu_seqlens"
            )
    else:
        _tensor("cu_seqlens", cu_seqlens)
        if hidden.dim() != 2 and hidden_index is None:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}, expected packed (positions, H) "
                "because cu_seqlens is given"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, "
                "expected (sequences + 1,) integers"
            )
    if hidden_index is None:
        _shape("labels", labels, hidden.shape[:-1], "one label for each hidden state")
    else:
        _dims("labels", labels, 2 if cu_seqlens is None else 1)
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences < (0 if empty else 1):
        raise ValueError(f"the batch holds {max(sequences, 0)} sequences, expected at least one")


def _places(hidden_index: Tensor, hidden: Tensor, labels: Tensor) -> None:
    _tensor("hidden_index", hidden_index)
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected (N, H) because hidden_index is given"
        )
    if hidden_index.dtype != torch.int64:
        raise ValueError(f"hidden_index has dtype {hidden_index.dtype}, expected torch.int64")
    _device("hidden_index", hidden_index, hidden.device)
    _shape("hidden_index", hidden_index, labels.shape, "one place for each label")


def _dims(name: str, value: Tensor, dims: int) -> None:
    if value.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {dims} dimensions")


def _whole(name: str, value: Tensor) -> None:
    """No DTensor, whose gradient would not be reduced as its mesh asks, or not at all."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor {tuple(value.shape)}, expected a plain tensor. Where FSDP shards it, compute the "
            "loss inside the model's forward (fastdpop.attach does): its full_tensor() would get no reduced gradient. "
            f"Where it is tensor parallel, pass {name}.to_local() and tp_group="
        )


def storage(name: str, value: Tensor) -> None:
    """The numbers of a tensor are there; engines would read what is not theirs."""
    if value.numel() == 0:
        return
    strides = zip(value.shape, value.stride(), strict=True)
    last = value.storage_offset() + sum((size - 1) * stride for size, stride in strides)
    if value.untyped_storage().nbytes() < (last + 1) * value.element_size():
        raise RuntimeError(
            f"{name} {tuple(value.shape)} has no storage any more: FSDP has resharded its module. Read and use the "
            "parameter inside that module's forward (fastdpop.attach does), or unshard() the module until the loss is "
            "computed"
        )


def projection(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", empty: bool = False
) -> None:
    """Weight and bias fit the hidden states; of a vocabulary that is split, one process may have none (`empty`)."""
    name = f"{prefix}weight"
    _tensor(name, weight)
    for each, value in ((f"{prefix}hidden", hidden), (name, weight), (f"{prefix}bias", bias)):
        if isinstance(value, Tensor):
            _whole(each, value)
            if not torch.compiler.is_compiling():
                storage(each, value)
    if (
        weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or 0 in weight.shape[1 if empty else 0 :]
    ):
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) "
            f"to fit {prefix}hidden {tuple(hidden.shape)}, with V and H at least 1"
            + instead.of_width(hidden, weight, prefix)
        )
    _device(name, weight, hidden.device)
    if bias is not None:
        _tensor(f"{prefix}bias", bias)
        _shape(f"{prefix}bias", bias, weight.shape[:1], "one value per token of the vocabulary")
        _device(f"{prefix}bias", bias, hidden.device)


def head(weight: object, bias: object) -> None:
    """An lm_head by itself: ``(V, H)``, and ``(V,)`` beside it."""
    found = _tensor("weight", weight)
    if found.dim() != 2 or found.shape[1] == 0:
        raise ValueError(
            f"weight has shape {tuple(found.shape)}, expected (V, H) with H at least 1"
        )
    if bias is not None:
        of_bias = _tensor("bias", bias)
        _shape("bias", of_bias, found.shape[:1], "one value per token of the vocabulary")


def vocabulary(vocab_size: object, rows: int | None = None) -> None:
    """How many tokens there are, of at most so many rows of the lm_head where these are known."""
    number = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
    if not number or vocab_size < 1 or (rows is not None and vocab_size > rows):  # type: ignore[operator]
        most = "" if rows is None else f" from 1 to {rows}, the rows of the lm_head"
        raise ValueError(f"vocab_size is {vocab_size!r}, expected a number of tokens{most}")


def sequence_parallel(name: str, hidden: object, labels: object, parts: int) -> None:
    """Hidden states are one of so many equal parts of every sequence, labels all of it."""
    own, whole = _tensor(name, hidden), _tensor("labels", labels)
    if own.dim() != 3 or whole.dim() != 2 or own.shape[1] * parts != whole.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(own.shape)} and labels {tuple(whole.shape)}, expected (S, T / {parts}, H) "
            "and (S, T) with sequence_parallel"
        )


def split_sequences(split: bool, shift: bool, ld_alpha: float | None) -> None:
    """What the parts of a sequence need, where it is split over ranks."""
    if split and shift:
        raise ValueError(
            "shift_labels is True, expected False with cp_group: labels are shifted before sequences are split, "
            "or a token is lost at every boundary"
        )
    if split and ld_alpha is not None:
        raise ValueError(
            f"ld_alpha is {ld_alpha}, expected None with cp_group: it counts tokens from a sequence's beginning, "
            "which a part does not know"
        )


def compute_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else that of all the tensors."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype not in FLOATS[1:]:
                raise ValueError(
                    f"{prefix}{name} has dtype {value.dtype}, expected one of {FLOATS[1:]} under autocast"
                )
        return torch.get_autocast_dtype(kind)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise ValueError(
                f"{prefix}{name} has dtype {value.dtype}, expected {hidden.dtype}, that of {prefix}hidden "
                "(cast one of them, or use torch.autocast)"
            )
    return hidden.dtype


def same_vocabulary(ref_weight: Tensor, weight: Tensor) -> None:
    """Labels mean the same tokens for policy and reference."""
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} rows, expected {weight.shape[0]}, the vocabulary of weight"
        )


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` is shaped as `other` but for H, and stands on its device."""
    _tensor(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype}, expected one of {FLOATS}")
    if value.dim() != other.dim() or value.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {(*other.shape[:-1], 'H')}, the positions of {other_name}"
        )
    _device(name, value, other.device)


def workspace(value: int | None, default: int) -> int:
    """A positive number of bytes."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(
            f"workspace_bytes is {value!r}, expected a positive number of bytes or None"
        )
    return value


def pairs(
    value: object, sequences: int, accepts_unpaired: bool, device: torch.device, empty: bool = False
) -> Tensor | None:
    """``(P, 2)`` sequence indices, or None for the default, which needs an even number of sequences; where others have
    pairs, there may be none (`empty`).
    """
    if value is None:
        if sequences % 2:
            raise ValueError(
                f"the batch holds {sequences} sequences, expected an even number "
                "(chosen first, then rejected), or pairs="
            )
        return None
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"pairs is {value!r}, expected (P, 2) sequence indices") from error
    if (
        table.dim() != 2
        or table.shape[1] != 2
        or len(table) < (0 if empty else 1)
        or table.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8)
    ):
        raise ValueError(
            f"pairs has shape {tuple(table.shape)} and dtype {table.dtype}, expected (P, 2) integers with P >= 1"
        )
    low, high = (int(table.min()), int(table.max())) if len(table) else (0, -1)
    if low < -1 or high >= sequences:
        raise ValueError(
            f"pairs contains {low if low < -1 else high}, expected sequence indices in [0, {sequences}) or -1"
        )
    absent = table < 0
    if bool(absent.all(dim=1).any()):
        raise ValueError("pairs contains [-1, -1], expected at least one side in every row")
    if bool(absent.any()) and not accepts_unpaired:
        raise ValueError(
            "pairs contains -1, expected both sides of every pair for this loss "
            "(kto, bco_pair, apo_zero and sft take unpaired data)"
        )
    return table.to(device=device, dtype=torch.int64)


def reference(ref_logps: object, ref_hidden: object, ref_weight: object, ref_bias: object) -> None:
    """At most one source of reference log-probs, and no orphaned argument."""
    if ref_logps is not None and ref_hidden is not None:
        raise ValueError("ref_logps and ref_hidden are both given, expected one of them")
    if ref_hidden is None and ref_weight is not None:
        raise ValueError("ref_weight is given without ref_hidden, expected both")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias is given without ref_weight, expected both")


def ref_logps(value: object, pairs: Tensor, sequences: int, weighed_by_pair: bool) -> Tensor:
    """Reference log-probs as ``(2, P)`` float64, or float32 if a side is; arbitrary where a side is
    absent.

    `weighed_by_pair`: a sequence's log-prob depends on its partner (LD-DPO), and sides may share
    sequences.
    """
    count, device = len(pairs), pairs.device
    if isinstance(value, Tensor):
        _shape(
            "ref_logps", value, (sequences,), "one value per sequence, or pass (chosen, rejected)"
        )
        _device("ref_logps", value, device)
        _unrounded("ref_logps", value)
        if weighed_by_pair:
            present = pairs[pairs >= 0].tolist()
            if len(set(present)) < len(present):
                raise ValueError(
                    "ref_logps has one value per sequence, expected (chosen, rejected) by pair: with "
                    "ld_alpha a sequence that serves several pairs has a log-prob for each"
                )
        return value.detach()[pairs.clamp_min(0)].T.contiguous()
    if not isinstance(value, Sequence) or len(value) != 2:
        expected = f"a tensor ({sequences},) or a pair of tensors ({count},)"
        raise TypeError(instead.of_no_tensor("ref_logps", value, expected))
    for name, side in zip(("ref_logps[0]", "ref_logps[1]"), value, strict=True):
        _shape(name, _tensor(name, side), (count,), "one value per pair")
        _device(name, side, device)
        _unrounded(name, side)
    chosen, rejected = (side.detach() for side in value)
    if chosen.dtype != rejected.dtype:
        # Both as exact as the less exact one: they are compared with values rounded alike.
        chosen, rejected = chosen.float(), rejected.float()
    return torch.stack([chosen, rejected])


def kl(value: object, device: torch.device) -> None:
    """A scalar tensor."""
    tensor = _tensor("kl", value)
    _shape("kl", tensor, (), "a 0-d tensor")
    _device("kl", tensor, device)
    _unrounded("kl", tensor)


def pair_value(name: str, value: object, pairs: int, device: torch.device) -> None:
    """``(P,)`` numbers of the data."""
    found = _tensor(name, value)
    if found.dtype == torch.bool or found.is_complex():
        raise ValueError(f"{name} has dtype {found.dtype}, expected floating point or integers")
    if found.is_floating_point():
        _unrounded(name, found)
    _shape(name, found, (pairs,), "one value per pair")
    _device(name, found, device)
    if found.requires_grad:
        raise ValueError(f"{name} requires grad, expected numbers of the data: detach it")


def weighting(
    token_weights: Tensor | None,
    ld_alpha: float | None,
    labels: Tensor,
    sequences: int,
    reduction: str,
) -> None:
    """Token weights and LD-DPO's alpha make sense together with the rest."""
    if reduction == "token" and (token_weights is not None or ld_alpha is not None):
        raise ValueError(
            "token_weights and ld_alpha weigh the sums of reduction='sequence', expected neither with 'token'"
        )
    if token_weights is not None:
        _shape(
            "token_weights",
            _tensor("token_weights", token_weights),
            labels.shape,
            "one weight per label",
        )
        _device("token_weights", token_weights, labels.device)
        _unrounded("token_weights", token_weights)
    if ld_alpha is not None:
        number = isinstance(ld_alpha, (int, float)) and not isinstance(ld_alpha, bool)
        if not number or not 0.0 <= ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha is {ld_alpha!r}, expected a value in [0, 1]")
        if sequences % 2:
            raise ValueError(
                f"ld_alpha compares sequences i and i + S / 2, expected an even number of sequences, "
                f"got {sequences}"
            )
