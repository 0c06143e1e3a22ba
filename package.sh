#!/usr/bin/env bash
# Makes a bundle: a folder that runs on a machine which has nothing, wherever it is put. See docs/packaging.md.
set -euo pipefail
usage() {
    cat <<'EOF'
usage: ./package.sh [--short] [DEST]

  DEST     the folder to make (default: dist/bundle); one that is there is replaced
  --short  in seconds, for tests: without compiler, licences and manifest, nothing stripped, nothing proved

Takes what ./install.sh has put into .venv, and calls it where that is missing.

Environment:
  SOURCE_DATE_EPOCH  the time of all files (default: that of the last commit)
  UV                 the uv to use; otherwise the one on PATH, otherwise that of ./install.sh
EOF
}
fail() { echo "package.sh: $*" >&2; exit 1; }

form=()
if [ "${1-}" = --short ]; then
    form=(short)
    shift
fi
case ${1-} in
-h | --help) usage; exit 0 ;;
-*) usage >&2; fail "unknown argument: $1" ;;
esac
[ $# -le 1 ] || { usage >&2; fail "one folder, not $#"; }
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
dest=$(readlink -m -- "${1:-$here/dist/bundle}")
cd -- "$here"
if [ ! -e .venv/installed ] || [ ! -e common/pb/backend_pb2_grpc.py ]; then
    ./install.sh
fi
if [ -e "$dest" ] && [ -n "$(ls -A -- "$dest")" ]; then
    for part in run.sh lib/environment.sh proto/backend.proto; do
        [ -e "$dest/$part" ] || fail "$dest is there and is no bundle: it has no $part"
    done
fi
for tool in strip ldconfig; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || fail "$tool is not installed"
done
uv=${UV-$(command -v uv || echo .uv/bin/uv)}
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
exec "$uv" run --quiet --no-project --isolated --python .venv/bin/python \
    --with-requirements packaging/bundle-tools.txt python -m bundling "$site" "$dest" "${form[@]}"
