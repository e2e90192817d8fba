#!/usr/bin/env bash
# All that only a GPU can answer, in one call of less than 10 minutes. Needs no installation and no network: this
# checkout, and a Python with torch, triton, transformers, pytest and hypothesis.
#
#   bench/h100.sh [both]         # both parts; .venv, else python3; writes build/h100
#   bench/h100.sh first          # small checks, time of Llama 3's head with 8,192 rows, tests/gpu
#   bench/h100.sh rest           # other heads, steps with shared prefixes, memory, compute-sanitizer
#   bench/h100.sh --plan         # without a GPU: what would be launched and compiled, and how long it takes
#   SELECT='improbable or autocast' bench/h100.sh    # of tests/gpu, only these
#   OUT=results PYTHON=/path/to/python CARRY=/path/to/wheels bench/h100.sh
#
# CARRY names a folder with unpacked wheels (Liger, TRL), which are measured beside it. OUT gets h100.json, h100.md
# (both whole after every case, so that a run which is cut off keeps what it has), tests.json, log.txt and
# sanitizer.txt; the first two can go to bench/results as they are. `rest` with another OUT:
# `python -m bench.chip --report` puts the two together. The last lines printed are a short table and a verdict. The exit code is 0 when every part
# passed. A part that fails does not keep the next one from running, except that the run ends where most of the smoke
# test fails: nothing else would mean anything.
set -uo pipefail
cd "$(dirname "$0")/.."

WHAT=${1:-both}
case $WHAT in first | rest | both | --plan) ;; *)
  echo "usage: bench/h100.sh [both | first | rest | --plan]" >&2
  exit 2
  ;;
esac
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "bench/h100.sh: PYTHON is '$PYTHON', expected a Python that is there" >&2
  exit 1
fi
export PYTHONPATH="$PWD${CARRY:+:$CARRY}${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
unset TRITON_INTERPRET
if [[ $WHAT == --plan ]]; then exec "$PYTHON" bench/plan.py; fi

OUT=${OUT:-build/h100}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
# What is compiled once serves every process, and no part waits for a compiler.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton} TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor
FAILED=()
START=$SECONDS

# Seconds of each part: CHECK, COMPILE, SMOKE, MAIN, TESTS, HEADS, SHARING, MEMORY, SANITIZER; and LIMIT, SHARDS.
if ! numbers=$("$PYTHON" bench/plan.py --budgets); then exit 1; fi
eval "$numbers"

atmost() { # the smaller of a wish and what is left
  local left=$((LIMIT - (SECONDS - START)))
  echo $((left < $1 ? (left > 5 ? left : 5) : $1))
}
say() { echo "[$((SECONDS - START)) s] $*" | tee -a "$LOG"; }
attempt() { # attempt NAME SECONDS COMMAND...: with its output in the log, and its failure in the verdict
  local name=$1 seconds code
  seconds=$(atmost "$2")
  shift 2
  say "$name, at most $seconds s"
  timeout --kill-after=5 "$seconds" "$@" >>"$LOG" 2>&1
  code=$?
  if [[ $code -ne 0 ]]; then
    FAILED+=("$name: exit code $code$([[ $code -eq 124 || $code -eq 137 ]] && echo ', not finished in time')")
    tail -n 12 "$LOG" | cut -c -600
  fi
  return $code
}

: >"$LOG"
# Another run begins; the second part goes on with the first one's results.
[[ $WHAT == rest ]] || rm -f "$OUT"/{h100.json,h100.md,tests.json}
rm -f "$OUT/sanitizer.txt"
if ! attempt "looking for a GPU" "$CHECK" "$PYTHON" -c '
import importlib.util, torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
for package in ("triton", "pytest"):
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{package} is not installed")
import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
'; then exit 1; fi
(nvidia-smi; free -g; nproc) >>"$LOG" 2>&1

attempt "compiling" "$COMPILE" "$PYTHON" bench/plan.py --compile "$(($(nproc) > 2 ? $(nproc) - 1 : 2))"

# chip PART SECONDS: it starts no case in the last 25 seconds, which includes its own start. Without the self-check,
# which the smoke test has: if it is wrong, times are still worth having.
chip() { FASTDPOP_SELF_CHECK=0 attempt "$1" "$2" "$PYTHON" -m bench.chip "$1" --output "$OUT" --seconds $(($(atmost "$2") - 25)); }

run_tests() { # in shards beside each other; without the project's other plugins and fixtures
  local pids=() i code seconds
  seconds=$(atmost "$TESTS")
  say "tests/gpu, $SHARDS processes, at most $seconds s"
  for ((i = 1; i <= SHARDS; i++)); do
    FASTDPOP_SHARD="$i/$SHARDS" FASTDPOP_SELF_CHECK=0 timeout --kill-after=5 "$seconds" "$PYTHON" -m pytest tests/gpu \
      --confcutdir=tests/gpu -k "${SELECT:-}" -W default -v --tb=short -p no:cacheprovider \
      >"$SCRATCH/tests-$i.log" 2>&1 &
    pids+=($!)
  done
  for ((i = 1; i <= SHARDS; i++)); do
    wait "${pids[$((i - 1))]}"
    code=$?
    if [[ $code -ne 0 ]]; then FAILED+=("tests, shard $i: exit code $code"); fi
  done
  cat "$SCRATCH"/tests-*.log >>"$LOG"
  # From the logs, not from XML that is written at the end: a shard that is cut off keeps what it has.
  "$PYTHON" bench/plan.py --count "$SCRATCH"/tests-*.log --output "$OUT/tests.json" 2>&1 | tee -a "$LOG"
  if [[ ${PIPESTATUS[0]} -ne 0 ]]; then FAILED+=("tests/gpu: see tests.json and log.txt"); fi
}

sanitize() { # memory and races, on a small step of every kernel
  local tool found seconds thirds=1
  found=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z "$found" ]]; then
    say "no compute-sanitizer here"
    return
  fi
  for tool in memcheck racecheck; do
    seconds=$(atmost $((SANITIZER * thirds / 3)))
    thirds=2 # racecheck is the slower one
    say "$tool, at most $seconds s"
    FASTDPOP_SELF_CHECK=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$seconds" "$found" --tool "$tool" \
      --error-exitcode 9 "$PYTHON" -m bench.chip smoke --tiny >"$SCRATCH/$tool.txt" 2>&1
    case $? in
    0) say "$tool: clean" ;;
    124 | 137) say "$tool: not finished in time" ;;
    *) FAILED+=("$tool: $(grep -m1 -E '=========|Error' "$SCRATCH/$tool.txt")") ;;
    esac
    (echo "== $tool"; tail -c 200000 "$SCRATCH/$tool.txt") >>"$OUT/sanitizer.txt"
  done
}

if [[ $WHAT != rest ]]; then
  attempt "smoke" "$SMOKE" "$PYTHON" -m bench.chip smoke --output "$OUT"
  if [[ $? -eq 3 ]]; then # the rest would measure nothing, and time on a GPU is dear
    say "most of the smoke test failed: stopped"
    exit 1
  fi
  chip main "$MAIN"
  run_tests
fi
if [[ $WHAT != first ]]; then
  chip heads "$HEADS"
  chip sharing "$SHARING"
  chip memory "$MEMORY"
  sanitize
fi

echo
[[ -f "$OUT/h100.json" ]] && "$PYTHON" -m bench.chip --report "$OUT/h100.json" --output "$OUT" | tail -c 9000
echo
for line in "${FAILED[@]}"; do echo "FAILED $line" | tee -a "$LOG"; done
if [[ ${#FAILED[@]} -eq 0 ]]; then say "everything passed"; else say "${#FAILED[@]} parts failed"; fi
# Files that come back should be small.
[[ $(wc -c <"$LOG") -gt 8000000 ]] && tail -c 8000000 "$LOG" >"$SCRATCH/log" && cp "$SCRATCH/log" "$LOG"
exit $((${#FAILED[@]} > 0))
