#!/usr/bin/env bash
# Starts the backend: `run.sh --addr HOST:PORT`. Execs Python, so this process id is the server's.
set -eu
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
python="$here/.venv/bin/python"
# An orchestrator may leave descriptor 0 closed, and the first file opened would take its place.
[ "${1-}" = chat ] || exec </dev/null
if [ ! -x "$python" ] || [ ! -d "$here/common/pb" ]; then
    echo "run.sh: nothing is installed in $here/.venv; run $here/install.sh first" >&2
    exit 1
fi
# Our own modules are found by PYTHONPATH alone: the folder can move, and the working directory stays out of sys.path.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec "$python" -m backend.entry "$@"
