#!/usr/bin/env bash
# Train: find or make a Python environment, pick the number of processes, start torchrun.
#
#   ./run.sh                                        picks preset, device and processes for this machine
#   NPROC=2 NUM_ITERATIONS=200 ./run.sh             any setting, and the number of processes, overridden
#   ./run.sh --help | --dry-run                     explain the settings | show what would run
#
# PYTHON names another interpreter than python3.
set -eu

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do  # a link to run.sh means the checkout that it leads to
    link=$(readlink "$script")
    case $link in /*) script=$link ;; *) script=$(dirname "$script")/$link ;; esac
done
here=$(CDPATH='' cd -P -- "$(dirname "$script")" && pwd)
python=${PYTHON:-python3}

found=none
! command -v "$python" >/dev/null || found=$("$python" --version 2>&1 | head -n 1)
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "run.sh: needs Python 3.10 or newer; '$python' is $found; set PYTHON=/path/to/python." >&2
    exit 2
fi

# Succeeds where every line of requirements.txt is installed in an allowed version, else says which is not.
has_requirements() {
    "$1" - "$here/requirements.txt" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:  # pip carries a copy
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit(f"run.sh: {sys.executable} has no pip")
for line in open(sys.argv[1], encoding="utf-8"):
    text = line.split("#")[0].strip()
    if not text:
        continue
    wanted = Requirement(text)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        sys.exit(f"run.sh: {sys.executable} needs {wanted}, found {found or 'none'}")
PY
}

if has_requirements "$python"; then
    :
elif [ -x "$here/.venv/bin/python" ] && has_requirements "$here/.venv/bin/python"; then
    python=$here/.venv/bin/python
    echo "run.sh: using $python"
else
    echo "run.sh: installing requirements.txt in $here/.venv (PyTorch with CUDA takes gigabytes)"
    "$python" -m venv "$here/.venv" || { echo "run.sh: could not make $here/.venv; install Python's" \
        "venv module (Debian, Ubuntu: apt install python3-venv), or requirements.txt yourself." >&2; exit 1; }
    python=$here/.venv/bin/python
    "$python" -m pip install -r "$here/requirements.txt" || { echo "run.sh: pip could not install" \
        "$here/requirements.txt; see its message above, then run this again." >&2; exit 1; }
fi

for argument in "$@"; do  # these need no torchrun
    case $argument in
        -h | --help | --dry-run | --nproc | --sample | --sample=*) exec "$python" "$here/train_gpt.py" "$@" ;;
    esac
done

# Checks arguments, settings and data too, so that what is wrong is said once, before torchrun starts.
nproc=$("$python" "$here/train_gpt.py" --nproc "$@")

# Several processes on a CPU share its cores; torchrun's own default would leave all but one a process idle.
if [ "$nproc" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
    export OMP_NUM_THREADS=$((cores > nproc ? cores / nproc : 1))
fi

set -- "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$here/train_gpt.py" "$@"
echo "+ $*"
exec "$@"
