#!/usr/bin/env bash
# Check and time the model on a GPU in at most 8 minutes: scripts/gpu_check.sh [ANNOTATIONS_DIR] [OPTIONS]
# It needs this repository, and torch, transformers, accelerate, scipy and pyyaml; nothing has to be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
HF_HUB_OFFLINE=1 PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
