#!/usr/bin/env bash
# Scores an adapter (or a whole model) against its base: ROUGE-1/2/L and BLEU-4; writes predictions and report.
#   bash scripts/evaluate.sh ADAPTER_DIR [section.key=value ...]     e.g.  data.test_file=mine.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PYTHON" -m chatglm_ptuning evaluate "$@"
