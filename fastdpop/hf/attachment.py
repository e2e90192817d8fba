"""Attaching fastdpop to a model, and undoing it."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from fastdpop import checks, engines
from fastdpop.choices import EngineName, GradReduction
from fastdpop.distributed.parallel import Parallel
from fastdpop.hf import self_check
from fastdpop.hf.forward import attached_forward, attachment_of
from fastdpop.hf.guards import add_guards, remove_guards
from fastdpop.hf.head import output_head
from fastdpop.hf.interception import unwatch, watch
from fastdpop.hf.tree_attention import uninstall
from fastdpop.hf.unfit import no_model, other_model
from fastdpop.hf.wrappers import innermost, wrapped
from fastdpop.hf.zero import PartitionedHead

if TYPE_CHECKING:
    from fastdpop.api import Ranks

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    *,
    engine: EngineName = "auto",
    workspace_bytes: int | None = None,
    share_prefixes: bool = False,
    check: bool = True,
    group: Ranks | None = None,
    cp_group: Ranks | None = None,
    tp_group: Ranks | None = None,
    grad_reduction: GradReduction = "mean",
) -> Model:
    """Let a Hugging Face causal language model's ``forward`` compute preference losses, without logits.

    ``forward`` then also accepts, by keyword:

    - ``preference``: a loss's name, a loss (``losses.get("dpop", beta=0.3, lam=50.0)``) or a function of
      ``PairLogps``. The batch is ``(2B, T)``, chosen sequences first; `labels` are aligned with the ids, -100 where a
      token is not scored.
    - ``ref_logps``: the reference's log-probs, a pair of ``(B,)`` tensors or one ``(2B,)``.
    - ``return_logps=True``, instead of ``preference``: log-probs only, differentiable where gradients are on.
    - ``router_loss_weight``: the weight of a mixture of experts' router loss; its config's by default.
    - ``prefix_tree``: of a batch that :func:`fastdpop.pack` has laid out, instead of an attention mask.
    - ``preference_options``: a dict of further arguments of :func:`fused_preference_loss` (``pairs``, ``kl``,
      ``reduction``, ``statistics``, ...) or, with ``return_logps``, of :func:`fused_logps`; and ``share_prefixes``,
      for this call. With ``cu_seqlens`` the ids are ``(1, positions)``.

    Such calls return a :class:`~fastdpop.hf.PreferenceModelOutput`; all others are as before, and calls from several
    threads do not disturb each other. Parameters, ``state_dict``, ``generate`` and saving are untouched. A deep copy is
    attached too, an unpickled one is not.

    Args:
        model: the model, or a PEFT model around it (the inner model is attached). Attach before wrapping or compiling.
        engine, workspace_bytes: as in :func:`fused_preference_loss`, for all calls.
        share_prefixes: run what the sequences of a batch begin with in common through the model once, and no padding:
            the same outputs from the same arguments, faster. The first such call compares the two on a few short
            sequences; a model or call that cannot share computes the padded batch, with one warning that says why.
        group, cp_group, grad_reduction: as in :func:`fused_preference_loss`, for all calls: the processes whose batches
            are one, those that hold parts of every sequence, and how gradients are combined over them (DDP and FSDP
            average). The model and its wrapper must do their part.
        tp_group: the processes that hold parts of the lm_head, whose weight is this one's rows. A head that torch's
            ColwiseParallel or transformers' ``tp_plan`` has split knows them by itself.
        check: run the model on ten tokens and compare with its own logits, and see that no token has a part in what is
            before it. Pass False for a model that cannot run yet:
            on the meta device, or sharded when not every rank attaches. What fastdpop cannot follow is an error then
            too, at the first call; only a model that is inconsistent in itself goes unnoticed.

    Returns:
        The same model. Attaching again replaces engine, workspace, `share_prefixes` and groups.

    Raises:
        TypeError: `model` is not a causal language model, or is wrapped or compiled; a flag is neither True nor False.
        ValueError: there is no such engine, a group is none, or the model to check is on the meta device.
        RuntimeError: the head has no floating-point weight, head or model do to the logits what fastdpop cannot follow,
            or its log-probs differ from fastdpop's.
    """
    target = causal_lm(model)
    unfit = other_model(target)
    if unfit is not None:
        raise TypeError(unfit)
    if engine != "auto":
        engines.get(engine)
    checks.workspace(workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)
    with PartitionedHead(target):
        head = output_head(target)
    if check and head.weight.is_meta:
        raise ValueError("check is True, expected False for a model on the meta device")
    checks.flag("check", check)
    checks.flag("share_prefixes", share_prefixes)
    settings = {
        "engine": engine,
        "workspace_bytes": workspace_bytes,
        "share_prefixes": share_prefixes,
        "group": group,
        "cp_group": cp_group,
        "tp_group": tp_group,
        "grad_reduction": grad_reduction,
    }
    Parallel.of(group, cp_group, tp_group, grad_reduction)
    attachment = attachment_of(target)
    new = attachment is None or attachment.settings != settings
    if new:
        detach(target)
        target.forward = attached_forward(target, settings)
        add_guards(target)
        watch(head)
    if check:
        attached = attachment_of(target)
        assert attached is not None
        attached.settings["cp_group"] = None  # each process checks whole sequences
        try:
            self_check.check(target, head)
        except BaseException:
            if new:
                detach(target)
                if attachment is not None:  # as it was before
                    attach(target, **attachment.settings, check=False)
            raise
        finally:
            attached.settings["cp_group"] = cp_group
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach` exactly. A model that is not attached is left alone.

    ``forward`` then takes ``preference`` as it takes any keyword that it does not know: in silence.

    Raises:
        RuntimeError: ``forward`` was wrapped again after `attach`, for example by accelerate.
    """
    target = causal_lm(model)
    attachment = attachment_of(target)
    if attachment is not None:
        if hasattr(target.forward, "__wrapped__"):
            raise RuntimeError(
                f"the forward of {type(target).__name__} was wrapped after fastdpop.attach: unwrap it first "
                "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
        del target.forward
        previous = attachment.previous
        if attachment.bound and previous is not None and previous.__self__ is not target:
            # In a deep copy of an attached model the method still belongs to the model that was copied.
            previous = MethodType(previous.__func__, target)
        if previous is not None:
            target.forward = previous
    uninstall(target)
    remove_guards(target)
    for module in target.modules():  # every one that has been the head
        unwatch(module)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether calls of a model with ``preference=`` are answered by fastdpop.

    Args:
        model: a causal language model, or what stands around one: PEFT, DDP, ``torch.compile``.

    Returns:
        False also where ``forward`` was replaced since, or wrapped by something that does not tell what it wraps.

    Raises:
        TypeError: there is no causal language model in `model`.
    """
    return attachment_of(causal_lm(innermost(model))) is not None


def causal_lm(model: Any) -> Any:
    """The model to attach to; inside a PEFT model, the one it adapts."""
    name = type(model).__name__
    if wrapped(model) is not None:
        raise TypeError(
            f"model is a {name}, expected the model inside it: attach before wrapping or compiling"
        )
    peft = not isinstance(model, type) and hasattr(model, "get_base_model")
    target = model.get_base_model() if peft else model
    if not isinstance(target, nn.Module) or not hasattr(target, "get_output_embeddings"):
        raise TypeError(no_model(model))
    return target
