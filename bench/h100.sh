#!/usr/bin/env bash
# Speed and memory on an H100 (or any CUDA GPU), in one call and with nothing to download: the checkout, and a
# Python that has a CUDA build of torch and the packages of `pip install '.[bench]'`. TRL and Liger are left out
# where they are not installed. Writes bench/results/<device>.{json,md} and charts, and prints the bars.
#
#   bench/h100.sh                       # .venv, else python3
#   PYTHON=/path/to/python bench/h100.sh -k "gsm8k-like"     # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

"$PYTHON" - <<'CHECK'
import torch

if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
CHECK

mkdir -p build
"$PYTHON" -m pytest bench --benchmark-only --benchmark-quiet --device cuda \
  --benchmark-json build/bench-cuda.json "$@"
"$PYTHON" bench/report.py build/bench-cuda.json
"$PYTHON" bench/report.py --bars build/bench-cuda.json
