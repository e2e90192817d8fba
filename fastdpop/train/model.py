"""The model of a run, its reference and its tokenizer, from what ``--model`` names."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import trl
from accelerate import PartialState
from packaging.version import Version
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.utils import get_peft_config, get_quantization_config

from fastdpop.integrations.trl.options import check_revision
from fastdpop.train import adapted
from fastdpop.train.parse import Asked

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Source:
    """What ``--model`` names: a model, or an adapter and the model that it belongs to.

    Attributes:
        base: path or name of the model.
        adapter: path or name of the adapter, if there is one.
        vocab_size: rows of the model's embedding.
        context: the most tokens that it takes; None if its configuration does not say.
    """

    base: str
    adapter: str | None
    vocab_size: int | None
    context: int | None


def model_source(asked: Asked) -> Source:
    """Look at the configuration of the model, without loading it.

    Raises:
        ValueError, OSError: there is no such model; options for a new adapter beside an old one.
    """
    name, trust = asked.model.model_name_or_path, trusts(asked)
    assert name is not None  # the command line was checked
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
        raise ValueError(f"--model is {name!r}: there is no such folder")
    if Path(name).is_file():
        raise ValueError(f"--model is {name!r}, which is a file, expected a folder")
    check_revision(name, asked.model.model_revision)
    adapter = base = None
    if find_adapter_config_file(name) is not None:
        from peft import PeftConfig

        adapter, base = name, PeftConfig.from_pretrained(name).base_model_name_or_path
        if not base:
            raise ValueError(f"{name}: adapter_config.json names no base_model_name_or_path")
        if asked.model.model_revision not in (None, "main"):
            raise ValueError(
                f"--model_revision {asked.model.model_revision} has no effect: {name} holds an adapter, which is "
                "loaded as it is now; download the revision, and name its folder"
            )
        if asked.config.sync_ref_model and not asked.own.merge_adapter:
            raise ValueError(
                f"--sync_ref_model has no place here: {name} holds an adapter, and no reference beside it could move. "
                "--merge-adapter merges it into its base model first"
            )
        new = sorted(
            n for n in asked.given if n.startswith("lora_") or n in ("use_rslora", "use_dora")
        )
        if new and not asked.own.merge_adapter:
            raise ValueError(
                f"--{new[0]} has no effect: {name} holds an adapter, which is trained further. "
                "--merge-adapter merges it into its base model first"
            )
    elif asked.own.merge_adapter:
        raise ValueError(f"--merge-adapter has no effect: {name} holds no adapter")
    base = base or name
    revision = None if adapter else asked.model.model_revision
    try:
        loaded = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust)
    except OSError as error:
        if Path(base).exists():
            raise
        raise OSError(
            f"--model is {name!r}: there is no folder {base}, and of the Hub: {error}"
        ) from error
    config = loaded.get_text_config()
    return Source(
        base,
        adapter,
        getattr(config, "vocab_size", None),
        getattr(config, "max_position_embeddings", None),
    )


def trusts(asked: Asked) -> bool:
    """Whether code that a model brings along may run."""
    # TRL before 1.8 has it in the other one.
    return any(getattr(where, "trust_remote_code", False) for where in (asked.config, asked.model))


def load_tokenizer(asked: Asked, source: Source) -> Any:
    """The tokenizer, with another chat template if one was named.

    Raises:
        ValueError, OSError: there is none, or no such template.
    """
    trust = {"trust_remote_code": trusts(asked)}
    names = [asked.own.tokenizer] if asked.own.tokenizer else [source.adapter, source.base]
    if source.adapter and not (Path(source.adapter) / "tokenizer_config.json").exists():
        names = names[-1:]
    name = next(name for name in names if name)
    revision = (
        {"revision": asked.model.model_revision} if name == asked.model.model_name_or_path else {}
    )
    option = "--tokenizer" if asked.own.tokenizer else "--model"
    _check_tokenizer_files(option, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **trust, **revision)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        here = "" if Path(name).exists() else f"there is no folder {name}, and of the Hub: "
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{option} is {name!r}: its tokenizer cannot be loaded: {here}{said}"
        ) from error
    if asked.own.chat_template_path:
        tokenizer.chat_template = _template(Path(asked.own.chat_template_path))
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"{name}: its tokenizer has neither a pad_token nor an eos_token, and batches are padded "
            "with one of them: set it in tokenizer_config.json"
        )
    return tokenizer


def _check_tokenizer_files(option: str, name: str) -> None:
    """
    Raises:
        ValueError: the name is that of a file, or of a folder here without a tokenizer.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{option} is {name!r}, which is a file, expected a folder")
    if folder.is_dir() and not any(any(folder.glob(files)) for files in _TOKENIZER_FILES):
        raise ValueError(
            f"{option} is {name!r}, which holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): --tokenizer names "
            "another folder for it"
        )


def _template(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--chat-template-path is {str(path)!r}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # transformers' own tag
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: no valid template ({error.message})") from None
    if not text.strip():
        raise ValueError(f"{path}: the chat template is empty")
    if "messages" not in text or "{%" not in text:
        raise ValueError(
            f"{path}: no chat template, which would go through 'messages' in a {{% for %}}"
        )
    return text


def load_model(asked: Asked, source: Source) -> tuple[Any, Any, Any]:
    """The model to train, its reference if TRL could not make it itself, and a new adapter's settings.

    Where an adapter is trained further, TRL takes a copy of its first state as the reference; a new
    adapter's reference is the model without it.

    Raises:
        ValueError, OSError: it cannot be loaded.
    """
    model = _load(asked, source)
    trains_adapter = asked.model.use_peft or (source.adapter and not asked.own.merge_adapter)
    online = not asked.config.precompute_ref_log_probs
    # TRL loads a reference by the model's name alone: in every step, under FSDP, and before TRL 1.4.
    special = asked.own.merge_adapter or asked.model.model_revision != "main"
    loads = asked.config.fsdp or Version(trl.__version__) < Version("1.4")
    reference = None
    if not trains_adapter and (online or (special and loads)):
        reference = _load(asked, source)
    # All of it is in the model already.
    asked.config.model_init_kwargs = None
    new = asked.model.use_peft and not (source.adapter and not asked.own.merge_adapter)
    if new:
        adapted.check(asked.model, model)
    return model, reference, get_peft_config(asked.model) if new else None


def _load(asked: Asked, source: Source) -> Any:
    model_args, config = asked.model, asked.config
    dtype = model_args.dtype
    if dtype is None:
        # Trained weights stay float32, or small updates would be rounded away; frozen ones need not.
        adapter = model_args.use_peft or (source.adapter and not asked.own.merge_adapter)
        dtype = "bfloat16" if adapter and config.bf16 else "float32"
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": trusts(asked),
    }
    if source.adapter is None:
        options["revision"] = model_args.model_revision
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        options["quantization_config"] = quantization
        options["device_map"] = {"": PartialState().local_process_index}
    more: Any = config.model_init_kwargs  # JSON has been parsed
    options |= more or {}
    name = source.adapter or source.base
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.base, output_loading_info=True, **options
        )
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"it has no weights for {sorted(report['missing_keys'])[:3]}")
        _check_finite(model)
        if source.adapter is None:
            return model
        from peft import PeftModel

        tuned: Any = PeftModel.from_pretrained(model, source.adapter, is_trainable=True)
        _check_finite(tuned)
        if asked.own.merge_adapter:
            return tuned.merge_and_unload().requires_grad_()
        return _with_whole_reference(tuned)
    except torch.OutOfMemoryError:
        raise
    # Weights of other shapes, a file cut short or damaged, a model that is none for text.
    except (
        TypeError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        ValueError,
    ) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


def _check_finite(model: torch.nn.Module) -> None:
    for name, weight in model.named_parameters():
        wide = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if wide and not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, expected finite weights")


def _with_whole_reference(model: Any) -> Any:
    """An adapter's model whose copy as the adapter "ref" is complete.

    TRL copies the parameters that have ".default." within their names. Those that end with it, such as
    IA3's and those of LoRA on an embedding, would stay as they were made.
    """
    own = model.add_adapter

    def add_adapter(name: str, *args: Any, **kwargs: Any) -> None:
        own(name, *args, **kwargs)
        parameters = dict(model.named_parameters())
        for full, parameter in parameters.items():
            if "default" in full.split("."):
                copied = ".".join(name if part == "default" else part for part in full.split("."))
                parameters[copied].data.copy_(parameter.data)

    model.add_adapter = add_adapter
    return model
