#!/usr/bin/env bash
# Builds nightcrier in one file, dist/nightcrier.pyz, and the checksums beside it, SHA256SUMS.
#
#   ./build_zipapp.sh [--slim | --host-only | --targets PATTERN] [OPTION…]
#
# Hosts: CPython 3.11 to 3.15 on Linux (x86_64 and aarch64, glibc and musl) and macOS (x86_64, arm64)
#
#   --slim             of these, only Linux with glibc
#   --host-only        only this machine with this Python: quick to build, for a try
#   --targets PATTERN  those that a shell pattern names, as in 'cp31[1-3]-linux-musl-*'
#
# Bytecode is that of the Pythons which are found: as python3.N in PATH, in ~/.pyenv/versions, and
# the one that builds. All others compile at their first start, at some cost.
#
#   --bytecode PY      one more, rather than one that is found; may be repeated
#
# Other options:
#
#   --offline          take wheels from the cache only; otherwise pip fetches those that are missing
#   --wheels DIR       the cache of wheels, build/wheels if not given
#   --python PY        the interpreter to build with, python3 if not given
#   --output FILE      dist/nightcrier.pyz if not given; SHA256SUMS is written beside it
#   --twice            build a second time, elsewhere, and compare
#
# It needs bash, and Python 3.11 or newer with pip. Only wheels whose SHA-256 is in
# requirements.lock are used. To change one, edit its version there and run
#
#   python3 zipapp/pack.py --renew-lock
#
# The same commit gives the same bytes where the Pythons, their zlib and their xz are the same. Times
# in the file are that of the commit, or SOURCE_DATE_EPOCH.
set -euo pipefail

unset CDPATH # with it, cd prints where it went
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3 output=$root/dist/nightcrier.pyz twice=''
pack=(-B "$root/zipapp/pack.py")

die() {
    echo "build_zipapp.sh: $1" >&2
    exit "${2:-1}"
}

while (($#)); do
    case $1 in
        --slim | --host-only | --offline) pack+=("$1") && shift ;;
        --targets | --bytecode | --wheels) pack+=("$1" "${2:?"$1 needs a value"}") && shift 2 ;;
        --python) python=${2:?"$1 needs an interpreter"} && shift 2 ;;
        --output) output=${2:?"$1 needs a file name"} && shift 2 ;;
        --twice) twice=1 && shift ;;
        -h | --help) sed -n -e '2,/^set/s/^# //p' -e '2,/^set/s/^#$//p' "$0" && exit ;;
        *) die "no such option: $1 (--help lists them)" 2 ;;
    esac
done

executable=$("$python" -c 'import sys; print(sys.executable if sys.version_info >= (3, 11) else "")') ||
    die "cannot run $python; name another Python with --python" 5
[[ $executable ]] || die "needs Python 3.11 or newer, and $python is older; name one with --python" 5
"$executable" -c 'import lzma, zlib' 2>/dev/null || die "$python has no lzma; name another with --python" 5

name=$(basename "$output")
mkdir -p "$(dirname "$output")"
dist=$(cd "$(dirname "$output")" && pwd)
output=$dist/$name sums=$dist/SHA256SUMS

# Beside the output: what is done gets there at once, and a /tmp may forbid to run what is in it.
work=$(mktemp -d "$dist/.building-XXXXXX")
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work

# Writes SHA256SUMS: the lines of other files, and those that are given.
write_sums() {
    local digest file
    [[ -e $sums ]] && while read -r digest file; do
        [[ $file == "$name" ]] || echo "$digest  $file"
    done <"$sums" >"$work/sums"
    printf '%s' "$@" >>"$work/sums"
    mv "$work/sums" "$sums"
}

rm -f "$output" # what is there at the end is what this build made
[[ ! -e $sums ]] || write_sums
"$executable" "${pack[@]}" --output "$work/$name" --pythons-file "$work/pythons"

if [[ $twice ]]; then
    echo "building again, to compare"
    mkdir "$work/again"
    (
        umask 077
        export TMPDIR=$work/again TZ=Asia/Tokyo
        "$executable" "${pack[@]}" --offline --output "$work/again/$name" >/dev/null
    )
    cmp "$work/$name" "$work/again/$name" || die "a second build gave other bytes"
fi

# The smoke test: a user who has nothing but this file and a python3.
try() { # try HOME COMMAND…
    env -i HOME="$1" PATH="$host/bin:/usr/bin:/bin" "${@:2}" >"$host/log" 2>&1 && return
    cat "$host/log" >&2
    die "smoke test failed with $interpreter: ${*:2}"
}

smoke_test() {
    interpreter=$1 host=$2
    mkdir -p "$host/home" "$host/bin"
    ln -s "$interpreter" "$host/bin/python3"
    try "$host/home" "$work/$name" version
    try "$host/home" "$work/$name" migrate up --sqlite "$host/smoke.db"     # fills the cache
    try "$host/home" "$work/$name" migrate status --sqlite "$host/smoke.db" # uses it
    try /nonexistent python3 -I "$work/$name" migrate status --sqlite "$host/smoke.db" # has none
}

tests=()
while read -r interpreter; do
    echo "smoke test with $interpreter"
    smoke_test "$interpreter" "$work/host${#tests[@]}" &
    tests+=($!)
done <"$work/pythons"
((${#tests[@]})) || echo "no smoke test: no Python here can run this file"
for test in ${tests[@]+"${tests[@]}"}; do wait "$test"; done

digest=$("$executable" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$work/$name")
mv "$work/$name" "$output"
write_sums "$digest  $name"$'\n'
echo "$digest  $name"
echo "$output: $(wc -c <"$output") bytes, built in $SECONDS s"
