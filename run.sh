#!/bin/sh
# Starts the backend: `run.sh --addr HOST:PORT`; `run.sh serve MODEL ...` is `vllm serve`. Execs Python, so this process
# id is the server's.
# Calls no command: in a bundle it works where there is none.
set -eu
case $0 in
*/*) self=$0 ;;
*) self=./$0 ;;
esac
while [ -L "$self" ]; do
    link=$(command -p readlink -- "$self") || { echo "run.sh: $self is a link, which needs readlink" >&2; exit 1; }
    case $link in
    /*) self=$link ;;
    *) self=${self%/*}/$link ;;
    esac
done
here=$(CDPATH='' cd -P -- "${self%/*}/" && pwd -P)
# An orchestrator may leave descriptor 0 closed, and the first file opened would take its place.
[ "${1-}" = chat ] || exec </dev/null
if [ -d "$here/python" ]; then
    # shellcheck source=packaging/bundle-environment.sh
    . "$here/lib/environment.sh"
else
    python=$here/.venv/bin/python
    if [ ! -x "$python" ] || [ ! -e "$here/.venv/installed" ] || [ ! -d "$here/common/pb" ]; then
        echo "run.sh: nothing is installed in $here/.venv, or not all of it; run $here/install.sh first" >&2
        exit 1
    fi
fi
# Our own modules are found by PYTHONPATH alone: the folder can move, and the working directory stays out of sys.path.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec "$python" -m backend.entry "$@"
