# shellcheck shell=sh
# Sourced by run.sh in a bundle, whose folder is $here: names the interpreter, and sets what the user has not set.
# A machine may have nothing but this shell: no command is called. No variable takes a path where a space would end it.
# shellcheck disable=SC2034  # run.sh uses it
# shellcheck disable=SC2154  # run.sh sets it
python=$here/python/bin/python3
unset PYTHONHOME
export PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
# After the user's own; the bundle's own files find theirs by themselves.
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$here/lib"
if [ -d "$here/toolchain" ]; then
    # By name, for a list of paths ends at a space. The engine's processes bind their threads with this libgomp.
    export LD_PRELOAD="${LD_PRELOAD-libtcmalloc_minimal.so.4:libgomp.so.1}"
    # Inductor's compiler, by name for the same reason, which no other folder has; and lscpu, which vLLM asks.
    export CXX="${CXX:-bundled-g++}"
    export PATH="${PATH:+$PATH:}$here/bin:$here/toolchain/bin"
fi
