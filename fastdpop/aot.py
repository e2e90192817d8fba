"""``fastdpop kernels``: every shipped kernel configuration, compiled ahead of time and read.

No GPU is needed: triton compiles for a target that is not there, and brings the tools that take the
result apart. What a launch would only find out on the chip is found here: registers that spill,
matrix products that miss the tensor cores or wait for one another, operands that change under a
product, arithmetic in float64, more shared memory than a multiprocessor has. Whatever is found must
not be shipped, in any configuration.

The registry of the kernels says what to compile, with the signatures, constants and alignment that
the launchers guarantee; :mod:`fastdpop.sass` reads what comes out.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import fastdpop
from fastdpop import sass

REGISTRY = "fastdpop.kernels.registry"
INSTALL = "pip install 'fastdpop[triton]' (Linux)"


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor of a target has, and what one program may take of it (CUDA C++
    Programming Guide, technical specifications per compute capability). Shared memory in bytes.
    """

    capability: int
    shared: int
    shared_of_a_program: int
    warps: int
    programs: int = 32
    registers: int = 65_536
    shared_reserved: int = 1_024

    def programs_per_sm(self, registers: int, shared: int, warps: int) -> int:
        """How many programs fit a multiprocessor at once; registers of a thread are granted by 8,
        shared memory by 128 bytes.
        """
        of_a_warp = 32 * (-(-registers // 8) * 8)
        of_a_program = -(-(shared + self.shared_reserved) // 128) * 128
        by_registers = self.registers // of_a_warp // warps
        return min(by_registers, self.shared // of_a_program, self.warps // warps, self.programs)


CHIPS = {
    "sm_80": Chip(80, shared=164 * 1024, shared_of_a_program=163 * 1024, warps=64),
    "sm_90a": Chip(90, shared=228 * 1024, shared_of_a_program=227 * 1024, warps=64),
    "sm_100": Chip(100, shared=228 * 1024, shared_of_a_program=227 * 1024, warps=64),
}
"""Targets that can be compiled for."""


class Variant(Protocol):
    """A kernel in one configuration, as the registry lists it.

    Attributes:
        signature: the type of each argument as triton writes it, or "constexpr".
        constants: the values of those.
        attrs: what is known of arguments, by path, as triton's ``ASTSource`` takes it.
        default: whether launches on this target choose it by themselves.
        options: further keyword arguments of a launch.
        gluon: whether the kernel is written in Gluon.
        float64: whether it means to compute in float64.
        warpgroup: whether its 16-bit products must be those of warpgroups where there are such
            (sm_90a); not in small kernels that are rarely used.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel(self) -> Any: ...
    @property
    def signature(self) -> Mapping[str, str]: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...
    @property
    def attrs(self) -> Mapping[Any, Any]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def target(self) -> str: ...
    @property
    def default(self) -> bool: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def gluon(self) -> bool: ...
    @property
    def float64(self) -> bool: ...
    @property
    def warpgroup(self) -> bool: ...


Entry = dict[str, Any]
"""A variant's line of the report; JSON."""


def run(targets: Sequence[str], out: Path, only: str = "*", jobs: int = 2) -> int:
    """Compile what the registry lists for `targets`, write cubins and ``report.json`` below `out`,
    print a table; 0, or 1 if something must not be shipped.

    Args:
        only: a shell pattern that names of variants must match.

    Raises:
        ImportError: there is no triton.
        ValueError: a target is unknown or has no variant of such a name, or TRITON_INTERPRET is set.
    """
    registry = _registry(REGISTRY)
    names: list[tuple[str, str]] = []
    for target in targets:
        chip(target)
        found = [v.name for v in registry.variants(target) if fnmatchcase(v.name, only)]
        if not found:
            raise ValueError(f"no kernel variant for target {target!r} matches {only!r}")
        names += [(target, name) for name in found]
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(REGISTRY, target, name, str(out)) for target, name in names]
    if jobs > 1:
        with processes(min(jobs, len(tasks))) as pool:
            entries = list(pool.map(_compile_by_name, tasks))
    else:
        entries = [_compile_by_name(task) for task in tasks]
    return finish(entries, out)


def processes(count: int) -> concurrent.futures.ProcessPoolExecutor:
    """A pool to compile in. Its processes end without tearing themselves down: triton 3.9 reports at
    length then what Gluon's compiler leaves behind.
    """
    # Not forked: torch and triton have threads by now.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, context, initializer=_end_at_once)


def _end_at_once() -> None:
    atexit.register(os._exit, 0)


def finish(entries: list[Entry], out: Path) -> int:
    """Write ``report.json``, print the table and what is wrong; the exit code."""
    entries = sorted(entries, key=lambda entry: (entry["target"], entry["name"]))
    triton = importlib.import_module("triton")
    versions = {"fastdpop": fastdpop.__version__, "triton": triton.__version__}
    # A triton may bring several, and choose by target.
    assemblers = {entry["target"]: entry["ptxas"] for entry in entries}
    report = {**versions, "ptxas": assemblers, "variants": entries}
    path = out / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    said = ", ".join(f"ptxas {version} for {target}" for target, version in assemblers.items())
    print(f"triton {versions['triton']}, {said}")
    print(table(entries))
    for entry in entries:
        for text in entry["errors"]:
            print(f"error: {entry['name']} ({entry['target']}): {text}", file=sys.stderr)
    bad = sum(bool(entry["errors"]) for entry in entries)
    print(f"{len(entries)} variants, {bad} with errors; {path}")
    return int(bad > 0)


def chip(target: str) -> Chip:
    """What is known of a target.

    Raises:
        ValueError: nothing.
    """
    if target not in CHIPS:
        raise ValueError(f"target is {target!r}, expected one of {sorted(CHIPS)}")
    return CHIPS[target]


def _registry(name: str) -> Any:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"compiling kernels needs triton: {INSTALL} ({error})") from None
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"):
        raise ValueError(
            "TRITON_INTERPRET is set: the interpreter has nothing to compile; unset it"
        )
    return importlib.import_module(name)


def _compile_by_name(task: tuple[str, str, str, str]) -> Entry:
    """In a process of its own: kernels do not travel between processes, their names do."""
    registry, target, name, out = task
    found = {variant.name: variant for variant in _registry(registry).variants(target)}
    return compile_variant(found[name], Path(out))


def compile_variant(variant: Variant, out: Path) -> Entry:
    """Compile one variant, write its cubin below `out`, and read it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdpop.engines.self_check import ptxas_version

    known = chip(variant.target)
    begin = time.perf_counter()
    source_of: Any = ASTSource
    if variant.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    source = source_of(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs=dict(variant.attrs),
    )
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
    usage = sass.resources(_tool("cuobjdump", "-res-usage", str(cubin)), kernel)
    code = sass.read(_tool("nvdisasm", "-c", str(cubin)), kernel)
    said = sass.messages(_ptxas_log(compiled.asm["ptx"], source, target, options))
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
        "products": products(compiled.asm["ttgir" if variant.gluon else "ttir"]),
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
        **read_code(code),
    }
    return judge(entry)


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


def read_code(code: sass.Code) -> Entry:
    """What the instructions say; a mix counts instructions of a warp by their kind."""
    steps = code.instructions()
    loops = code.main_loops()
    return {
        "instructions": len(steps),
        **{name.lower(): sass.count(steps, name) for name in ("HGMMA", "UTMALDG", "UTMASTG")},
        "handed_on_early": _names(code.handed_on_early()),
        "from_registers": sum(bool(step.multiplied) for step in steps),
        "mix": sass.mix(steps),
        "float64_names": _names([step for step in steps if step.kind == "float64"]),
        "main_loops": [_main_loop(code, loop) for loop in loops],
        "beside": sass.mix(code.beside_the_main_loops()),
        "beside_least": sass.mix(code.beside_the_main_loops(longest=False)),
        "beside_names": _names(code.beside_the_main_loops()),
    }


def _main_loop(code: sass.Code, loop: sass.Loop) -> Entry:
    steps = code.once_an_iteration(loop)
    return {
        "mix": sass.mix(steps),
        "names": _names(steps),
        "tensor": sorted({i.name for i in steps if sass.TENSOR.match(i.name)}),
        "hgmma": sass.count(steps, "HGMMA"),
        "in_flight": code.in_flight(loop) or 0,
        "never_waits": code.never_waits(loop),
        "rewritten": len(code.rewritten_in_flight(loop)),
    }


def _names(steps: Sequence[sass.Instruction]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in steps:
        counts[step.opcode] = counts.get(step.opcode, 0) + 1
    return dict(sorted(counts.items()))


def _listed(names: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in names.items())


_DOT = re.compile(r"tt\.dot ([^:]*): tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", re.ASCII)
_PRECISION = re.compile(r"inputPrecision = (\w+)")
_GLUON_DOT = re.compile(
    r"ttng\.warp_group_dot .*? : (?:!ttg\.memdesc|tensor)<(\d+)x(\d+)x(\w+)\b[^>]*>"
    r" \* !ttg\.memdesc<\d+x(\d+)x\w+\b",
    re.ASCII,
)


def products(code: str) -> list[Entry]:
    """The matrix products of a kernel before it is compiled (in ttir, of Gluon in ttgir): their
    sizes, the dtype they read, and the precision of fp32 products, ieee, tf32 or tf32x3.
    """
    found = []
    for operands, m, k, dtype, n in _DOT.findall(code):
        precision = _PRECISION.search(operands)
        size = {"m": int(m), "n": int(n), "k": int(k)}
        entry = {**size, "dtype": dtype, "precision": precision[1] if precision else "ieee"}
        found.append(entry)
    for m, k, dtype, n in _GLUON_DOT.findall(code):
        size = {"m": int(m), "n": int(n), "k": int(k)}
        found.append({**size, "dtype": dtype, "precision": "tf32" if dtype == "f32" else "ieee"})
    return found


def _on_tensor_cores(product: Entry) -> bool:
    if product["dtype"] == "f32":
        return bool(product["precision"] != "ieee")
    return product["dtype"] in ("bf16", "f16")


def judge(entry: Entry) -> Entry:
    """Add what is wrong with an entry: `errors`, for any of which it must not be shipped."""
    hopper = entry["target"] == "sm_90a"
    errors = [*_of_any_target(entry), *(_of_warpgroups(entry) if hopper else ())]
    return {**entry, "errors": errors}


def _of_any_target(entry: Entry) -> Iterator[str]:
    known = chip(entry["target"])
    if entry["shared"] > known.shared_of_a_program:
        yield (
            f"needs {entry['shared']:,} bytes of shared memory, a program may have "
            f"{known.shared_of_a_program:,}"
        )
    instructions = entry["mix"].get("spill", 0)
    spilled = ("stack", "local", "spill_stores", "spill_loads")
    if instructions or any(entry[kind] for kind in spilled):
        yield (
            f"spills: {entry['stack']} bytes of stack, {entry['local']} of local memory, "
            f"{entry['spill_stores']} stored and {entry['spill_loads']} loaded by "
            f"{instructions} instructions, at {entry['registers']} registers"
        )
    for loss in entry["losses"]:
        yield f"ptxas says {loss}"
    if entry["float64_names"] and not entry["float64"]:
        yield f"computes in float64, which it does not mean to: {_listed(entry['float64_names'])}"


def _of_warpgroups(entry: Entry) -> Iterator[str]:
    loops = entry["main_loops"]
    for loop in loops:
        if loop["never_waits"]:
            yield (
                "a main loop hands on shared memory and never waits for the products that read it "
                f"({loop['hgmma']} HGMMA)"
            )
        elif loop["hgmma"] and not loop["in_flight"]:
            yield (
                "keeps nothing in flight: every wait of a main loop is for all of its products "
                f"({loop['hgmma']} HGMMA)"
            )
    if entry["handed_on_early"]:
        yield (
            "hands on shared memory after a wait for products, before a barrier of the warps that "
            f"may not have waited yet: {_listed(entry['handed_on_early'])}"
        )
    if entry["from_registers"]:
        rewritten = max((loop["rewritten"] for loop in loops), default=0)
        yield (
            f"{entry['from_registers']} of {entry['hgmma']} HGMMA take their left operand from "
            + (
                f"registers, {rewritten} of which are written again while the products that read "
                "them may be in flight"
                if rewritten
                else "registers (none is seen to be written while products are in flight)"
            )
        )
    # Those of Gluon need not show in the source as this reads it: the declaration counts.
    meant = entry["gluon"] or any(map(_on_tensor_cores, entry["products"]))
    if entry["warpgroup"] and meant:
        others = {name for loop in loops for name in loop["tensor"] if not name.startswith("HGMMA")}
        if not sum(loop["hgmma"] for loop in loops):
            yield f"multiplies matrices without HGMMA in its main loop ({entry['hgmma']} elsewhere)"
        elif others:
            yield f"multiplies matrices in a main loop with {', '.join(sorted(others))} too"


_HEADER = ("variant", "", "warps", "stages", "regs", "stack", "local", "shared")
_HEADER_CODE = ("HGMMA", "in loop", "UTMALDG", "in flight", "per SM", "verdict")


def table(entries: Sequence[Entry]) -> str:
    """One line a variant; legible as it stands."""
    lines = [(*_HEADER, *_HEADER_CODE)]
    for e in entries:
        loops = e["main_loops"]
        lines.append(
            (
                e["name"],
                "default" if e["default"] else "",
                *(f"{e[k]:,}" for k in ("num_warps", "num_stages", "registers", "stack", "local")),
                f"{e['shared']:,}",
                str(e["hgmma"]),
                str(sum(loop["hgmma"] for loop in loops)),
                str(e["utmaldg"]),
                "/".join(str(loop["in_flight"]) for loop in loops if loop["hgmma"]) or "-",
                str(e["programs_per_sm"]),
                "ERROR" if e["errors"] else "ok",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _plain(value: Any) -> Any:
    """A constant as JSON has it; functions by their name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", str(value))


def _tool(name: str, *arguments: str) -> str:
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
