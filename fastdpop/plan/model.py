"""A model's numbers from its configuration alone: parameters, and what its layers keep and multiply."""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdpop.plan.trace import Traced, trace

_SLICED = {  # styles of transformers' plans, and the dimension that a rank has a part of
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "embedding_rowwise": 0,
    "rowwise": 1,
}


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter.

    Attributes:
        rank: of its matrices.
        targets: names of modules, or ``("all-linear",)``.
    """

    rank: int
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, or of a tensor-parallel rank's part of it.

    Attributes:
        all, trained: of the model; layer: of its largest layer, and layer_trained of it.
        layers: those of all layers.
        head, embedding: of the output and the input embedding; tied ones are counted once in `all`.
        head_trained: whether the head is.
        reduced: all-reductions of hidden states in a forward pass over tensor-parallel ranks.
    """

    all: int
    trained: int
    layers: int
    layer: int
    layer_trained: int
    head: int
    embedding: int
    head_trained: bool
    reduced: int


def read_config(name: str) -> Any:
    """The text configuration in a file, in a folder, or of a model on the Hub.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name)
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--model is {name!r}, which is no JSON: {error}") from error
        kind = str(fields.get("model_type")) if isinstance(fields, dict) else "none"
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"{name}: field 'model_type' is {kind!r}, expected a model of transformers"
            )
        try:
            config = CONFIG_MAPPING[kind].from_dict(fields)
        except (
            Exception
        ) as error:  # a field of another type, say; a model's own code may raise anything
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(f"{name} is no configuration of {kind}: {first}") from error
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"--model is {name!r}, expected a config.json, a folder with one, or a model of the "
                f"Hub: {first}"
            ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"--model is {name!r}, a quantised model, which is not estimated: give the configuration of the one that "
            "was quantised"
        )
    if getattr(config, "num_hidden_layers", 1) == 0:
        raise ValueError(f"{name}: field 'num_hidden_layers' is 0, expected at least one layer")
    return config.get_text_config()


class Model:
    """A causal language model on the meta device.

    Args:
        config: of transformers.
        lora: the adapter that is trained, instead of all weights.
        dtype: of the weights; an adapter's are float32.

    Raises:
        ValueError: it cannot be made from its configuration, or has no layers.
        ImportError: an adapter is asked for, and peft is not installed.
    """

    def __init__(self, config: Any, lora: Lora | None = None) -> None:
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(config)
        config.use_cache = False
        self.lora = lora
        try:
            with torch.device("meta"):
                self.whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except Exception as error:  # a model's own code may raise anything
            raise ValueError(f"the model cannot be made from its configuration: {error}") from error
        self.config = self.whole.config.get_text_config()
        self.path, layers = self._find_layers()
        self.kinds = self._kinds_of(layers)
        if lora is not None:
            self._adapt(lora)
        self.vocabulary, self.width = self.head.weight.shape

    @property
    def head(self) -> Any:
        """The output embedding."""
        return self.whole.get_output_embeddings()

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.kinds)

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one matrix."""
        return self.whole.get_input_embeddings().weight is self.head.weight

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        count = getattr(self.config, "num_hidden_layers", None)
        for path, module in self.whole.base_model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return path, module
        raise ValueError(
            f"the model ({self.config.model_type}) has no list of {count} layers to be planned by"
        )

    def _kinds_of(self, layers: nn.ModuleList) -> list[Any]:
        """What each layer is: layers of one kind cost the same."""
        types = getattr(self.config, "layer_types", None) or [None] * len(layers)
        return [
            (kind, type(layer), tuple((n, p.shape) for n, p in layer.named_parameters()))
            for kind, layer in zip(types, layers, strict=True)
        ]

    def _adapt(self, lora: Lora) -> None:
        from peft import LoraConfig, get_peft_model

        targets = list(lora.targets)
        options: Any = targets[0] if targets == ["all-linear"] else targets
        try:
            get_peft_model(self.whole, LoraConfig(r=lora.rank, target_modules=options))
        except ValueError as error:
            raise ValueError(f"--lora-targets is {','.join(targets)!r}: {error}") from error

    @property
    def layers(self) -> nn.ModuleList:
        """The model's layers."""
        found: nn.ModuleList = self.whole.base_model.get_submodule(self.path)
        return found

    @functools.cached_property
    def tensor_plan(self) -> dict[str, str]:
        """Transformers' tensor-parallel plan of the model, by patterns of names."""
        return dict(getattr(self.whole, "_tp_plan", None) or {})

    def why_not_split(self, ranks: int) -> str | None:
        """Why the model cannot be divided among tensor-parallel ranks, or None."""
        if not self.tensor_plan:
            return f"transformers has no tensor-parallel plan for {self.config.model_type}"
        other = sorted(set(self.tensor_plan.values()) - set(_SLICED))
        if other:
            return f"its tensor-parallel plan has parts ({other[0]}) that are not modelled"
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(self.config, name, None) or ranks
            if heads % ranks:
                return f"its {name}, {heads}, cannot be divided by {ranks}"
        return None

    def _style(self, path: str) -> int | None:
        """The dimension of a module's weight that is divided."""
        name, part = path, None
        for suffix, dimension in ((".base_layer", None), (".lora_A.", 1), (".lora_B.", 0)):
            if suffix in f"{path}.":
                name, part = path[: f"{path}.".index(suffix)], dimension
        for pattern, style in self.tensor_plan.items():
            if fnmatch.fnmatchcase(name, pattern):
                # Of an adapter's two matrices, the one beside the divided dimension is divided too.
                return _SLICED[style] if part in (None, _SLICED[style]) else None
        return None

    @functools.cache  # noqa: B019  a model lives as long as its plan
    def counts(self, tp: int = 1) -> Counts:
        """Parameters of a tensor-parallel rank, 1 / `tp` of what the plan divides."""
        total: Counter[str] = Counter()
        layers: Counter[str] = Counter()
        trained_in_layers: Counter[str] = Counter()
        base = self.whole.base_model_prefix
        reduced = 0
        seen = set()
        for path, module in self.whole.named_modules():
            cut = self._style(path) if tp > 1 else None
            reduced += cut == 1 and "weight" in module._parameters and ".lora_" not in path
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in seen:
                    continue
                seen.add(id(weight))
                count = weight.numel() if cut is None else -(-weight.numel() // tp)
                total["all"] += count
                total["trained"] += count * weight.requires_grad
                inside = f"{path}.{name}".removeprefix(f"{base}.").removeprefix(f"{self.path}.")
                if inside != f"{path}.{name}".removeprefix(f"{base}."):
                    number = inside.split(".")[0]
                    layers[number] += count
                    trained_in_layers[number] += count * weight.requires_grad
        head, embedding = self.head, self.whole.get_input_embeddings()
        return Counts(
            all=total["all"],
            trained=total["trained"],
            layers=sum(layers.values()),
            layer=max(layers.values()),
            layer_trained=max(trained_in_layers.values()),
            head=-(-head.weight.numel() // tp),
            embedding=-(-embedding.weight.numel() // tp),
            head_trained=any(p.requires_grad for p in head.parameters()),
            reduced=reduced,
        )

    def trunk(self, numbers: Sequence[int], *, dtype: torch.dtype, tp: int = 1) -> nn.Module:
        """A copy of the model without its head and with these layers only, on the meta device."""
        base, layers = self.whole.base_model, self.layers
        config = base.config.get_text_config()
        types = getattr(config, "layer_types", None)
        *parents, name = self.path.split(".")
        parent = base.get_submodule(".".join(parents))
        setattr(parent, name, nn.ModuleList([layers[i] for i in numbers]))
        try:
            cut = copy.deepcopy(base)
        finally:
            setattr(parent, name, layers)
        own = cut.config.get_text_config()
        own.num_hidden_layers = len(numbers)
        if types:
            own.layer_types = [types[i] for i in numbers]
        for parameter in cut.parameters():
            # An adapter's weights are float32 in any case.
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
        if tp > 1:
            self._divide(cut, tp)
        return cut

    def _divide(self, trunk: nn.Module, tp: int) -> None:
        prefix = f"{self.whole.base_model_prefix}."
        for path, module in trunk.named_modules():
            cut = self._style(prefix + path)
            if cut is None or isinstance(module, nn.Embedding):
                continue
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dim() > cut:
                    part = weight.data.narrow(cut, 0, weight.shape[cut] // tp)
                    setattr(module, name, nn.Parameter(part.clone(), weight.requires_grad))

    def traced(
        self,
        sequences: int,
        length: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        mask: bool = True,
        autocast: bool = False,
        checkpointing: bool = False,
        tp: int = 1,
    ) -> Traced:
        """A forward and backward pass of all layers: two of each kind are traced, and three, and the
        difference counts for each further one. (The first layer is unlike the others where only
        an adapter is trained.)

        Raises:
            ValueError: the model's code does not run without values.
        """

        def run(numbers: Sequence[int]) -> Traced:
            trunk = self.trunk(numbers, dtype=dtype, tp=tp)
            return trace(
                trunk, sequences, length, mask=mask, autocast=autocast, checkpointing=checkpointing
            )

        where: dict[Any, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            where.setdefault(kind, []).append(i)
        few = sorted(i for numbers in where.values() for i in numbers[:2])
        try:
            total = base = run(few)
            for numbers in where.values():
                if len(numbers) > 2:
                    more = run(sorted([*few, numbers[2]]))
                    total = total + (more - base) * (len(numbers) - 2)
        except Exception as error:  # a model's own code may raise anything
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"the layers of {self.config.model_type} cannot be traced: {first[0]}"
            ) from error
        return total
