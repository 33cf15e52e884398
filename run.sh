#!/usr/bin/env bash
# Train: find or make a Python environment, pick the number of processes, start torchrun.
#
#   ./run.sh                                        picks preset, device and processes for this machine
#   NPROC=2 NUM_ITERATIONS=200 ./run.sh             any setting, and the number of processes, overridden
#   ./run.sh --help | --dry-run                     explain the settings | show what would run
#
# PYTHON names another interpreter than python3.
set -eu

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "run.sh: expected Python 3.10 or newer as '$python', found $("$python" --version 2>&1 || true); set PYTHON to one." >&2
    exit 2
fi

# Succeeds where every line of requirements.txt is installed, in a version that it allows.
has_requirements() {
    "$1" - "$here/requirements.txt" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
try:
    from packaging.requirements import Requirement
except ImportError:  # pip carries a copy
    from pip._vendor.packaging.requirements import Requirement
for line in open(sys.argv[1]).read().split():
    wanted = Requirement(line)
    if not wanted.specifier.contains(version(wanted.name), prereleases=True):
        sys.exit(1)
PY
}

if has_requirements "$python"; then
    :
elif [ -x "$here/.venv/bin/python" ] && has_requirements "$here/.venv/bin/python"; then
    python=$here/.venv/bin/python
else
    echo "run.sh: $python lacks packages of requirements.txt; installing them in $here/.venv"
    "$python" -m venv "$here/.venv" || { echo "run.sh: could not make $here/.venv; install Python's venv module" \
        "(Debian, Ubuntu: apt install python3-venv), or install requirements.txt yourself." >&2; exit 1; }
    python=$here/.venv/bin/python
    "$python" -m pip install -r "$here/requirements.txt" || { echo "run.sh: pip could not install" \
        "$here/requirements.txt; see its message above, then run this again." >&2; exit 1; }
fi

for argument in "$@"; do  # nothing to start: train_gpt.py answers by itself
    case $argument in -h | --help | --dry-run) exec "$python" "$here/train_gpt.py" "$@" ;; esac
done

# Checks settings and data too, so that what is wrong with them is said once and before torchrun speaks.
nproc=$("$python" "$here/train_gpt.py" --nproc)

# Several processes on a CPU share its cores; torchrun's own default would leave all but one a process idle.
if [ "$nproc" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
    export OMP_NUM_THREADS=$((cores > nproc ? cores / nproc : 1))
fi

set -- "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$here/train_gpt.py" "$@"
echo "+ $*"
exec "$@"
