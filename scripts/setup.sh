#!/usr/bin/env bash
# Finds or makes the Python environment of this project and leaves its interpreter in $PYTHON.
#
#   bash scripts/setup.sh [dev]             prepare it now (dev: the tools of scripts/test.sh as well)
#   source scripts/setup.sh; setup [dev]    what the other scripts do
#
# The environment is the one that CHATGLM_PTUNING_PYTHON (a Python interpreter) or an active virtual
# environment names; otherwise .venv in the project, made on the first run. A named environment is
# yours: only missing packages are added to it, and this package is found through PYTHONPATH.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { echo "setup: $1" >&2; exit 1; }

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if is_new_enough "$candidate"; then echo "$candidate"; return; fi
  done
  fail "Python must be 3.11 or newer, got $(python3 --version 2>&1); install a newer one or name its interpreter in CHATGLM_PTUNING_PYTHON"
}

# The requirements that $PYTHON lacks, whatever their version: one a line.
missing_requirements() {
  "$PYTHON" - "$1" <<'PYTHON_CODE'
import importlib.metadata
import pathlib
import sys

pending = [pathlib.Path(sys.argv[1])]
while pending:
    file = pending.pop()
    for line in file.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.startswith("-r "):
            pending.append(file.parent / requirement[3:].strip())
        elif requirement:
            try:
                importlib.metadata.distribution(requirement.split("==")[0].split("[")[0])
            except importlib.metadata.PackageNotFoundError:
                print(requirement)
PYTHON_CODE
}

prepare_named() {
  command -v "$PYTHON" >/dev/null || fail "the interpreter of the environment must exist, got $PYTHON; correct CHATGLM_PTUNING_PYTHON or leave the virtual environment"
  is_new_enough "$PYTHON" || fail "Python must be 3.11 or newer, got $PYTHON = $("$PYTHON" --version 2>&1); name another one in CHATGLM_PTUNING_PYTHON"
  local missing
  missing="$(missing_requirements "$1")"
  if [ -n "$missing" ]; then
    echo "setup: installing into the environment of $PYTHON:" $missing
    "$PYTHON" -m pip install --quiet $missing || fail "pip could not install the packages above"
  fi
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

prepare_own() {
  if ! is_new_enough "$PYTHON"; then
    local base
    base="$(find_python)"
    echo "setup: making .venv with $("$base" --version 2>&1)"
    "$base" -m venv --clear "$ROOT/.venv" || fail "$base could not make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
  fi
  # The stamp is the hash of all that asks for packages; the path is in it because an editable
  # installation breaks when the project is moved.
  local stamp="$ROOT/.venv/.installed-${1##*/}" wanted
  wanted="$(cat "$ROOT"/requirements*.txt "$ROOT/pyproject.toml" <(echo "$ROOT") | sha256sum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing ${1##*/} into .venv (minutes on the first run)"
    "$PYTHON" -m pip install --quiet -r "$1" -e "$ROOT" || fail "pip could not install ${1##*/}"
    echo "$wanted" | tee "$ROOT/.venv/.installed-requirements.txt" >"$stamp"
  fi
}

setup() {
  local requirements="$ROOT/requirements${1:+-$1}.txt"
  [ -f "$requirements" ] || { echo "usage: bash scripts/setup.sh [dev]" >&2; exit 2; }
  if [ -n "${CHATGLM_PTUNING_PYTHON:-}" ]; then
    PYTHON="$CHATGLM_PTUNING_PYTHON"
    prepare_named "$requirements"
  elif [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$ROOT/.venv" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    prepare_named "$requirements"
  else
    PYTHON="$ROOT/.venv/bin/python"
    prepare_own "$requirements"
  fi
  export PYTHON
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  setup "$@"
  echo "setup: ready, $PYTHON"
fi
