#!/usr/bin/env bash
# Sets up what it needs, then checks style, types and behaviour.
#   bash scripts/test.sh [pytest arguments]      e.g.  -m slow   or   tests/training -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
cd "$ROOT"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -m "not slow and not gpu and not browser" "$@"
