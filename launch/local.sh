#!/usr/bin/env bash
# Runs llm_jax on this machine from a clone, in an environment (.venv) that it makes and keeps up to date itself.
#
#   launch/local.sh train --config=quickstart    any llm-jax command; relative paths are yours, not the clone's
#   launch/local.sh test [pytest arguments]      the tests
#   launch/local.sh python [arguments]           the environment's Python
#
# LLM_JAX_PYTHON  the Python to make the environment with (default: the newest supported one on PATH)
# LLM_JAX_VENV    where the environment lives (default: .venv in the clone)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${LLM_JAX_VENV:-$root/.venv}
stamp=$venv/.llm_jax_installed # written last: an environment without it was left half made

say() { printf '%s\n' "local.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

# "3.12.1 /where/it/lives" of a supported Python; nothing for a command that is missing, broken, too old or too new
describe_python() {
  "$1" -c 'import os, sys
v = sys.version_info
if (3, 11) <= v[:2] <= (3, 13): print("%d.%d.%d" % v[:3], os.path.realpath(sys.base_prefix))' 2>/dev/null || true
}

find_python() {
  local candidate found=""
  if [ -n "${LLM_JAX_PYTHON:-}" ]; then
    [ -n "$(describe_python "$LLM_JAX_PYTHON")" ] ||
      fail "LLM_JAX_PYTHON=$LLM_JAX_PYTHON is not a working Python 3.11, 3.12 or 3.13; give another or unset it."
    printf '%s\n' "$LLM_JAX_PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if [ -n "$(describe_python "$candidate")" ]; then
      printf '%s\n' "$candidate"
      return
    fi
    found+=$("$candidate" -c 'import sys; print(" %s is %d.%d." % (sys.argv[1], sys.version_info[0], sys.version_info[1]))' \
      "$candidate" 2>/dev/null || true)
  done
  fail "Python 3.11, 3.12 or 3.13 is needed, and none is on PATH.$found" \
    "Install one, or set LLM_JAX_PYTHON to its full path."
}

# What the environment depends on; another answer than the stamp's means: install again.
wanted() {
  printf '%s\n' "$root" "$(describe_python "$venv/bin/python")"
  cat "$root/pyproject.toml" "$root/constraints.txt"
}

up_to_date() {
  [ -f "$stamp" ] && [ "$(wanted)" = "$(cat "$stamp")" ] && right_python
}

right_python() {
  [ -z "${LLM_JAX_PYTHON:-}" ] || [ "$(describe_python "$LLM_JAX_PYTHON")" = "$(describe_python "$venv/bin/python")" ]
}

make_environment() {
  local python
  python=$(find_python)
  say "making $venv with Python $(describe_python "$python" | cut -d' ' -f1)"
  rm -rf -- "$venv"
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$(command -v "$python")" "$venv" || fail "uv could not make $venv (its reason stands above)."
  else
    "$python" -m venv "$venv" ||
      fail "$python cannot make environments; install its venv module (Debian, Ubuntu: apt install python3-venv) or uv."
  fi
}

install_packages() {
  local began=$SECONDS options=(--constraint "$root/constraints.txt" --editable "$root[test]")
  say "installing llm_jax and its packages (a minute or two)"
  rm -f -- "$stamp"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "${options[@]}" || install_failed
  else
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "${options[@]}" || install_failed
  fi
  wanted >"$stamp"
  say "ready after $((SECONDS - began)) s"
}

install_failed() {
  fail "the packages could not be installed (the reason stands above). Is the package index reachable and the disk" \
    "not full? The same command tries again."
}

prepare() {
  if command -v flock >/dev/null; then
    exec 9<"$root"
    flock 9 # two terminals at once: the second waits
  fi
  if ! up_to_date; then
    if [ ! -f "$stamp" ] || ! right_python || [ -z "$(describe_python "$venv/bin/python")" ]; then
      make_environment
    fi
    install_packages
  fi
  if command -v flock >/dev/null; then exec 9<&-; fi
}

prepare
export LLM_JAX_COMMAND=$0 # for the next commands that a run suggests
case ${1:-} in
  test)
    shift
    cd "$root"
    # A file at a time on each core, by name: first those of whole processes, which take longest
    exec "$venv/bin/python" -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder "$@"
    ;;
  python)
    shift
    exec "$venv/bin/python" "$@"
    ;;
  *) exec "$venv/bin/python" -m llm_jax.cli "$@" ;;
esac
