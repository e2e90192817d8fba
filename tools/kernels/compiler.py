"""Compiles variants of kernels for targets that are not here, and reads what comes out."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastdpop.installed import install
from tools.kernels import disassembly, report
from tools.kernels.chips import chip
from tools.kernels.gate import judge
from tools.kernels.report import Entry
from tools.kernels.variant import Variant, Variants

INSTALL = f"{install('triton')} (Linux)"


def compile_all(
    targets: Sequence[str],
    out: Path,
    only: str = "*",
    jobs: int = 2,
    variants: Variants | None = None,
) -> list[Entry]:
    """Compile what there is for `targets` and write the cubins below `out`.

    Args:
        only: a shell pattern that names of variants must match.
        jobs: processes.
        variants: what there is to compile for a target; the registry's if None.

    Raises:
        ImportError: there is no triton.
        ValueError: a target is unknown or has no variant of such a name, or TRITON_INTERPRET is set.
    """
    check_triton()
    if variants is None:
        # With it come the kernels, and triton.
        from tools.kernels import registry

        variants = registry.variants
    tasks: list[tuple[Variants, str, str, Path]] = []
    for target in targets:
        chip(target)
        names = [v.name for v in variants(target) if fnmatchcase(v.name, only)]
        if not names:
            raise ValueError(f"no kernel variant for target {target!r} matches {only!r}")
        tasks += [(variants, target, name, out) for name in names]
    out.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return [_compile_by_name(task) for task in tasks]
    with processes(min(jobs, len(tasks))) as pool:
        return list(pool.map(_compile_by_name, tasks))


def check_triton() -> None:
    """Whether there is something to compile with.

    Raises:
        ImportError: there is no triton.
        ValueError: it is set to interpret.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(f"compiling kernels needs triton: {INSTALL} ({error})") from None
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(
            "TRITON_INTERPRET is set: the interpreter has nothing to compile; unset it"
        )


def processes(count: int) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of processes to compile in. Its processes end without tearing themselves down: triton 3.9 reports at
    length then what Gluon's compiler leaves behind.
    """
    # Not forked: torch and triton have threads by now.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, context, initializer=_end_at_once)


def _end_at_once() -> None:
    atexit.register(os._exit, 0)


def _compile_by_name(task: tuple[Variants, str, str, Path]) -> Entry:
    """In a process of its own: kernels do not travel between processes, their names do."""
    variants, target, name, out = task
    found = {variant.name: variant for variant in variants(target)}
    return compile_variant(found[name], out)


def compile_variant(variant: Variant, out: Path) -> Entry:
    """Compile one variant, write its cubin below `out`, and read it."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastdpop.engines.self_check import ptxas_version

    known = chip(variant.target)
    begin = time.perf_counter()
    source = _source(variant)
    target = GPUTarget("cuda", known.capability, 32)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        **variant.options,
    }
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - begin
    folder = out / variant.target
    folder.mkdir(exist_ok=True)
    cubin = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', variant.name)}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    kernel = compiled.metadata.name
    usage = disassembly.resources(tool("cuobjdump", "-res-usage", str(cubin)), kernel)
    code = disassembly.read(tool("nvdisasm", "-c", str(cubin)), kernel)
    said = disassembly.messages(_ptxas_log(compiled.asm["ptx"], source, target, options))
    entry: Entry = {
        "name": variant.name,
        "target": variant.target,
        "default": variant.default,
        "kernel": kernel,
        "constants": {k: _plain(v) for k, v in variant.constants.items()},
        "signature": dict(variant.signature),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "options": {k: _plain(v) for k, v in variant.options.items()},
        "gluon": variant.gluon,
        "float64": variant.float64,
        "warpgroup": variant.warpgroup,
        "products": report.products(compiled.asm["ttgir" if variant.gluon else "ttir"]),
        "ptxas": ptxas_version(known.capability),
        "cubin": str(cubin.relative_to(out)),
        "seconds": round(seconds, 2),
        **usage._asdict(),
        "spill_stores": said.spill_stores,
        "spill_loads": said.spill_loads,
        "losses": list(said.losses),
        "shared": compiled.metadata.shared,
        # Of a specialised kernel the metadata count the warps of all roles.
        "programs_per_sm": known.programs_per_sm(
            usage.registers, compiled.metadata.shared, compiled.metadata.num_warps
        ),
        **report.read_code(code),
    }
    return judge(entry)


def _source(variant: Variant) -> Any:
    """What triton compiles of it."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    source_of: Any = GluonASTSource if variant.gluon else ASTSource
    return source_of(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs=dict(variant.attrs),
    )


def _ptxas_log(ptx: str, source: Any, target: Any, options: Mapping[str, Any]) -> str:
    """What ptxas says of a kernel: triton's own last step once more, which is not kept with what it
    compiles; so with the assembler and the options that this version of triton uses.
    """
    from triton import knobs
    from triton.compiler import make_backend

    backend = make_backend(target)
    stages: dict[str, Any] = {}
    parsed = backend.parse_options({**options, **source.parse_options()})
    backend.add_stages(stages, parsed, source.language)
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        stages["cubin"](ptx, {})
    return log.getvalue()


def _plain(value: Any) -> Any:
    """A constant as JSON has it; functions by their name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", str(value))


def tool(name: str, *arguments: str) -> str:
    """The output of one of the binary tools inside triton.

    Raises:
        OSError: it is missing or fails.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise OSError(f"{path} is missing: this triton was built without NVIDIA's tools; {INSTALL}")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{path.name} failed with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout + done.stderr
