#!/usr/bin/env bash
# Train or test, after setting up what that needs: in the current Python if it has the packages, else in .venv.
#   ./run.sh                               train: preset, device and number of processes are chosen, and told
#   NPROC=2 NUM_ITERATIONS=200 ./run.sh    any setting, from the environment
#   ./run.sh --help | --dry-run            explain the settings | check settings and data, show the plan
#   ./run.sh test [WORDS]                  run the tests; the words go to pytest
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # called as `sh run.sh`
set -eu

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do  # called through a link: follow it
    target=$(readlink -- "$script")
    case $target in
        /*) script=$target ;;
        *) script=$(dirname -- "$script")/$target ;;
    esac
done
here=$(cd -- "$(dirname -- "$script")" && pwd -P)
python=${PYTHON:-python3}  # PYTHON names another interpreter
needs=("$here/requirements.txt")
if [ "${1:-}" = test ]; then needs+=("$here/tests/requirements.txt"); fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
    echo "run.sh: expected Python 3.10 or newer, found $("$python" --version 2>&1); set PYTHON=/path/to/python." >&2
    exit 2
fi

has_packages() {  # whether an interpreter has every package that the files in needs list
    "$1" - "${needs[@]}" 2> /dev/null <<'PY'
import fileinput
from importlib.metadata import version
from packaging.requirements import Requirement  # huggingface_hub needs it, too
for line in fileinput.input():
    if text := line.split("#")[0].strip():
        need = Requirement(text)
        if not need.marker or need.marker.evaluate():
            if not need.specifier.contains(version(need.name), prereleases=True):
                raise SystemExit(1)
PY
}

if ! has_packages "$python"; then
    if ! has_packages "$here/.venv/bin/python"; then
        echo "run.sh: installing packages in $here/.venv (PyTorch with CUDA takes gigabytes)"
        "$python" -m venv "$here/.venv"  # on Debian and Ubuntu this needs: apt install python3-venv
        if [ "${1:-}" = test ] && ! "$here/.venv/bin/python" -c 'import torch' 2> /dev/null; then
            needs+=("$here/tests/requirements-torch.txt")
        fi
        "$here/.venv/bin/python" -m pip install "${needs[@]/#/--requirement=}"
    fi
    python=$here/.venv/bin/python
fi

if [ "${1:-}" = test ]; then
    cd "$here" && exec "$python" -m pytest "${@:2}"
fi
exec "$python" "$here/train_gpt.py" "$@"
