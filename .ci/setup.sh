#!/bin/sh
# Set up .venv with Python, the package in editable mode, and its requirements at the versions of constraints.txt.
# Usage: .ci/setup.sh [dev]. If the last set-up is up to date, nothing is done. PYTHON=... chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

NEEDED_GB=9
VENV="$(pwd -P)/.venv"
STAMP=.venv/installed # Written last, with extra and fingerprint. Without it the set-up of .venv was interrupted.
LOG=.venv/setup.log
FAILED=.venv/failed
extra=${1-}

say() { printf 'setup: %s\n' "$1" >&2; }
die() { for line in "$@"; do say "$line"; done; exit 1; }

runs() { "$1" -c "$2" >/dev/null 2>&1; }
fits() { runs "$1" 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; }

find_python() {
    if [ -n "${PYTHON-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3 python
    fi
    for candidate; do
        if fits "$candidate"; then
            # Some systems ship Python without the parts that make a virtual environment.
            if runs "$candidate" 'import ensurepip, ssl, venv'; then
                echo "$candidate"
                return
            fi
            partial=$candidate
        fi
    done
    [ -z "${partial-}" ] || die "$partial cannot make virtual environments (no ensurepip, ssl or venv module)." \
        "Debian and Ubuntu have them in python3-venv. Or name another Python: make PYTHON=/path/to/python3"
    [ -z "${PYTHON-}" ] || die "PYTHON=$PYTHON is not a Python of version 3.11 to 3.13."
    die "no Python of version 3.11 to 3.13 was found ($(python3 --version 2>&1 || true))." \
        "Install one, or name it: make PYTHON=/path/to/python3"
}

fingerprint=$(cat setup.py constraints.txt csrc/* | cksum)
done_extra=
done_fingerprint=
if [ -f "$STAMP" ]; then
    { read -r done_extra; read -r done_fingerprint; } <"$STAMP"
    done_extra=${done_extra#extra:}
fi
# A set-up with dev also serves calls without it, and keeps dev.
[ -n "$extra" ] || extra=$done_extra

# An environment is reused if it is complete, was made in this folder, runs, and has the requested Python.
usable() {
    [ -f "$STAMP" ] && grep -qxF "$VENV" .venv/location && fits .venv/bin/python || return 1
    [ -z "${PYTHON-}" ] && return 0
    version='import sys; print(sys.version_info[:3])'
    [ "$(.venv/bin/python -c "$version")" = "$("$PYTHON" -c "$version" 2>/dev/null)" ]
}

if usable; then
    [ "$extra $fingerprint" != "$done_extra $done_fingerprint" ] || exit 0
else
    python=$(find_python)
    [ ! -d .venv ] || say "making .venv again: the present one is incomplete, was moved, or has another Python"
    rm -rf .venv
fi

used_kb=0
[ ! -d .venv ] || used_kb=$(du -sk .venv | cut -f1)
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
short_kb=$((NEEDED_GB * 1024 * 1024 - used_kb - free_kb))
[ "$short_kb" -le 0 ] || die "not enough disk: .venv takes up to $NEEDED_GB GB, and $(pwd -P) has \
$((free_kb / 1024 / 1024)) GB free. Free $((short_kb / 1024 / 1024 + 1)) GB, then start again."

if [ ! -d .venv ]; then
    "$python" -m venv .venv || die "$python could not make .venv (see above)."
    printf '%s\n' "$VENV" >.venv/location
fi
rm -f "$STAMP" "$LOG" "$FAILED"
say "installing into .venv ($(.venv/bin/python --version)): some minutes, about 3 GB from the package index"
# Progress is shown only on a terminal; elsewhere only errors are shown.
set --
[ -t 2 ] || set -- -q --progress-bar off
# pip's cache doubles the disk space of the download, often on the same disk.
[ "$free_kb" -gt $((2 * NEEDED_GB * 1024 * 1024)) ] || set -- "$@" --no-cache-dir
# pip's progress goes to the terminal (3), its warnings and errors also to LOG. pip's own --log takes half a minute.
{
    .venv/bin/python -m pip install "$@" --no-compile -c constraints.txt -e ".${extra:+[$extra]}" 2>&1 >&3 ||
        : >"$FAILED"
} 3>&2 | tee "$LOG" >&2
if [ -f "$FAILED" ]; then
    if grep -q 'No space left on device' "$LOG"; then
        hint="The disk ran full: pip also needs room in TMPDIR and in its cache."
    elif grep -qE 'ConnectionError|Timeout|timed out|SSLError|ProxyError|NameResolution' "$LOG"; then
        hint="The package index was out of reach: check the network, or set PIP_INDEX_URL or HTTPS_PROXY."
    elif grep -q 'No matching distribution' "$LOG"; then
        hint="The index has no such version for this Python and system: try make PYTHON=python3.12."
    else
        hint="pip's last messages are above."
    fi
    die "installing failed. $hint" "The next make starts again."
fi
# pip compiles on one core. Some packages have files for other versions of Python, which cannot be compiled.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || :
# pip builds outside .venv, where there is no torch. The C++ form of the ops needs torch's headers, so it is built here.
.venv/bin/python setup.py -q build_ext --inplace >&2
printf 'extra:%s\n%s\n' "$extra" "$fingerprint" >"$STAMP"
say "done"
