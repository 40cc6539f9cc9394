#!/usr/bin/env bash
# bash setup.sh [cpu|tpu|gpu] makes .venv and installs the pinned packages and this project (editable) into it.
# A second run is a look at one stamp. A run that was cut short leaves no stamp, and the next one starts .venv afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "setup.sh: $2" >&2; exit "$1"; }

platform=${1:-cpu}
case $platform in
  cpu) requirements=requirements.txt ;;
  tpu | gpu) requirements=requirements-$platform.txt ;;
  -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' setup.sh
    exit
    ;;
  *) fail 2 "unknown platform '$platform': allowed are cpu, tpu and gpu" ;;
esac

name=maxtext-distillation # the prompt of .venv too, which tells ours from one made by hand
stamp=.venv/.installed
wanted="$platform $(cat requirements.txt "$requirements" pyproject.toml | sha256sum | cut -d ' ' -f 1)"
found=$(cat "$stamp" 2>/dev/null || true)
venv_runs() { .venv/bin/python -c '' 2>/dev/null; }

if [[ $found == "$wanted" ]] && venv_runs; then
  touch "$stamp" # make compares dates
  echo "setup: .venv is up to date ($platform)"
  exit
fi
if [[ -e .venv/pyvenv.cfg ]] && ! grep -q "$name" .venv/pyvenv.cfg; then
  fail 1 ".venv was not made by this script: move it away and run again"
fi

# Only a candidate that runs counts: a pyenv shim exists for every version and fails for all that are not selected.
# Through _base_executable, since the python on PATH may be that of the very .venv that is about to be replaced.
find_python() {
  local probe='import sys, ensurepip, venv; (3, 12) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print(sys._base_executable)'
  local candidate
  while read -r candidate; do
    "$candidate" -c "$probe" 2>/dev/null </dev/null && return
  done < <(
    type -aP python3.12 python3.13 python3
    printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23].*/bin/python
    uv python find --no-python-downloads '>=3.12,<3.14' 2>/dev/null
  )
  return 1
}

if [[ ${found%% *} != "$platform" ]] || ! venv_runs; then
  python=$(find_python) || fail 1 "no Python 3.12 or 3.13 with the venv module found: install one (apt-get install python3.12-venv, pyenv install 3.12 or uv python install 3.12) and run again"
  echo "setup: making .venv with $("$python" --version)"
  rm -f "$stamp"
  "$python" -m venv --clear --prompt "$name" .venv
fi
rm -f "$stamp"
echo "setup: installing the packages of $requirements (a minute or three)"
# uv takes a quarter of pip's time, but knows nothing of pip's own settings (mirrors, say): where it fails, pip does the
# work and reports what is wrong. -qq: errors only. --no-compile: Python compiles the few modules that are ever imported.
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input install -qq --no-compile "$@"; }
{ pip "$(grep '^uv==' requirements.txt)" && .venv/bin/python -m uv --quiet pip install --python .venv/bin/python -r "$requirements"; } 2>/dev/null ||
  pip -r "$requirements"
pip --no-deps --no-build-isolation -e .
echo "$wanted" >"$stamp"
echo "setup: done; source .venv/bin/activate, or use .venv/bin/python"
