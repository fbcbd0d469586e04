#!/usr/bin/env bash
# Builds nightcrier in one file, dist/nightcrier.pyz, for the machine and the Python it is built on.
#
#   ./build_zipapp.sh [--offline] [--wheels DIR] [--python PY] [--output FILE]
#
#   --offline      take wheels from the cache only; otherwise pip fetches those that are missing
#   --wheels DIR   the cache of wheels, build/wheels if not given
#   --python PY    the interpreter to build with and for, python3 if not given
#   --output FILE  dist/nightcrier.pyz if not given; FILE.sha256 is written beside it
#
# It needs bash, and Python 3.11 or newer with pip. Only wheels whose SHA-256 is in
# requirements.lock are used. To change one, edit its version there and run
#
#   python3 zipapp/pack.py --renew-lock
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
offline='' wheels=$root/build/wheels python=python3 output=$root/dist/nightcrier.pyz

die() {
    echo "build_zipapp.sh: $1" >&2
    exit "${2:-1}"
}

while (($#)); do
    case $1 in
        --offline) offline=$1 && shift ;;
        --wheels) wheels=${2:?"$1 needs a directory"} && shift 2 ;;
        --python) python=${2:?"$1 needs an interpreter"} && shift 2 ;;
        --output) output=${2:?"$1 needs a file name"} && shift 2 ;;
        -h | --help) sed -n -e '2,/^set/s/^# //p' -e '2,/^set/s/^#$//p' "$0" && exit ;;
        *) die "no such option: $1 (--help lists them)" 2 ;;
    esac
done

executable=$("$python" -c 'import sys; print(sys.executable if sys.version_info >= (3, 11) else "")') ||
    die "cannot run $python; name another Python with --python" 5
[[ $executable ]] || die "needs Python 3.11 or newer, and $python is older; name one with --python" 5

# Whoever builds this commit gets the same times in the archive.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$output" "$output.sha256" # what is there at the end is what this build made
built=$work/$(basename "$output")
"$executable" -B "$root/zipapp/pack.py" --wheels "$wheels" --output "$built" $offline

# The smoke test: a user who has nothing but this file and a python3.
echo "smoke test"
mkdir "$work/home" "$work/bin"
ln -s "$executable" "$work/bin/python3"

try() { # try HOME COMMAND...
    env -i HOME="$1" PATH="$work/bin:/usr/bin:/bin" "${@:2}" >"$work/log" 2>&1 && return
    cat "$work/log" >&2
    die "smoke test failed: ${*:2}"
}

database=$work/smoke.db
try "$work/home" "$built" version
try "$work/home" "$built" migrate up --sqlite "$database"     # fills the cache
try "$work/home" "$built" migrate status --sqlite "$database" # uses it
try "$work/home" python3 -I "$built" migrate status --sqlite "$database"
try /nonexistent "$built" migrate status --sqlite "$database" # has none

mkdir -p "$(dirname "$output")"
mv "$built" "$built.sha256" "$(dirname "$output")"
cat "$output.sha256"
echo "$output: $(wc -c <"$output") bytes, built and smoke-tested in $SECONDS s"
