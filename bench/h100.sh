#!/usr/bin/env bash
# All that only a GPU can answer, in one call of less than 9 minutes: tests/gpu, compute-sanitizer, time and memory.
# Needs no installation and no network: this checkout, and a Python with torch, triton and pytest. TRL and Liger are
# measured beside it where they are installed, compute-sanitizer runs where there is one.
#
#   bench/h100.sh                          # .venv, else python3; writes build/h100
#   OUT=results PYTHON=/path/to/python bench/h100.sh
#
# Writes summary.md, tests.json, chip.json, chip.md and logs to $OUT. The exit code is 0 when every part passed;
# a part that fails does not keep the next one from running.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-build/h100}
mkdir -p "$OUT"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
unset TRITON_INTERPRET
START=$SECONDS
LIMIT=${LIMIT:-520} # seconds for everything
SHARDS=${SHARDS:-6} # most of the tests' time is the compiler's
FAILED=()

left() { echo $((LIMIT - (SECONDS - START))); }
note() { echo "$*" >>"$OUT/summary.md"; }
atmost() { # the smaller of a wish and what is left
  local rest
  rest=$(left)
  echo $((rest < $1 ? (rest > 5 ? rest : 5) : $1))
}

: >"$OUT/summary.md"
"$PYTHON" - >"$OUT/machine.txt" 2>&1 <<'CHECK'
import importlib.util, subprocess, sys
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
for package in ("triton", "pytest"):
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{package} is not installed")
import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem"
print(subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True).stdout)
CHECK
if [[ $? -ne 0 ]]; then
  cat "$OUT/machine.txt" >&2
  exit 1
fi
note "# fastdpop on a GPU"
note ""
note "$(head -1 "$OUT/machine.txt")"
note ""

# Tests, in shards beside each other. They do without the project's other plugins and fixtures.
pids=()
for ((i = 1; i <= SHARDS; i++)); do
  FASTDPOP_SHARD="$i/$SHARDS" timeout "$(atmost 230)" "$PYTHON" -m pytest tests/gpu --confcutdir=tests/gpu -W default \
    -q -p no:cacheprovider --junitxml="$OUT/tests-$i.xml" >"$OUT/tests-$i.log" 2>&1 &
  pids+=($!)
done
for ((i = 1; i <= SHARDS; i++)); do
  wait "${pids[$((i - 1))]}"
  code=$?
  if [[ $code -ne 0 ]]; then FAILED+=("tests, shard $i: exit code $code"); fi
done
"$PYTHON" - "$OUT" >>"$OUT/summary.md" <<'COUNT'
import json, sys
from pathlib import Path
from xml.etree import ElementTree
out = Path(sys.argv[1])
found = {"passed": [], "failed": [], "skipped": []}
for path in sorted(out.glob("tests-*.xml")):
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        key = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[key].append(name)
(out / "tests.json").write_text(json.dumps(found, indent=1))
print("## Tests\n\n" + ", ".join(f"{len(names)} {key}" for key, names in found.items()) + "\n")
print("".join(f"- failed: {name}\n" for name in found["failed"]))
COUNT

# Memory and races, on a small step of every kernel.
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
note "## compute-sanitizer"
note ""
if [[ -z "$SANITIZER" ]]; then
  note "not found"
else
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(atmost 60)" "$SANITIZER" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" bench/chip.py --smoke >"$OUT/$tool.log" 2>&1
    code=$?
    case $code in
    0) note "- $tool: clean" ;;
    124) note "- $tool: not finished in time" ;;
    *)
      note "- $tool: exit code $code"
      FAILED+=("$tool: exit code $code")
      ;;
    esac
  done
fi
note ""

# Time and memory, with whatever time is left.
rest=$(($(left) - 40))
timeout $((rest > 30 ? rest + 35 : 65)) "$PYTHON" bench/chip.py --output "$OUT" \
  --seconds $((rest > 30 ? rest : 30)) >"$OUT/chip.log" 2>&1
code=$?
if [[ $code -ne 0 ]]; then FAILED+=("timing: exit code $code"); fi
[[ -f "$OUT/chip.md" ]] && sed 's/^# /## /' "$OUT/chip.md" >>"$OUT/summary.md"

note ""
note "## Verdict"
note ""
if [[ ${#FAILED[@]} -eq 0 ]]; then note "everything passed, in $((SECONDS - START)) s"; else
  for line in "${FAILED[@]}"; do note "- FAILED $line"; done
  note "in $((SECONDS - START)) s"
fi
cat "$OUT/summary.md"
exit $((${#FAILED[@]} > 0))
