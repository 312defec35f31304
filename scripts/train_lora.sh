#!/usr/bin/env bash
# LoRA: trains, scores against the untouched base, and says what to do next.
#   bash scripts/train_lora.sh [--config FILE] [section.key=value ...]
# Without arguments: the demo model and data. Several GPUs or hosts: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch --config "$ROOT/configs/lora.yaml" "$@"
