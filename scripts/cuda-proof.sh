#!/bin/sh
# Everything about the CUDA kernels that can be proven without a GPU, with none left out, long ones neither: the tests whose names begin
# with cuda, emulator, ptx or standin, the unit tests of src/cuda, and the model family on the stand-in for the driver. The last line
# counts them.
set -eu
cd "$(dirname "$0")/.."
scripts/setup-cuda.sh thor

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# tests FOLDER: the tests of those names of the package there, as options for cargo.
tests() {
    for path in "$1"/tests/cuda* "$1"/tests/emulator* "$1"/tests/ptx* "$1"/tests/standin*; do
        # A file, or a folder with a main file; other folders are parts of tests.
        if [ -f "$path" ] || [ -f "$path/main.rs" ]; then
            printf -- ' --test %s' "$(basename "$path" .rs)"
        fi
    done
}
result=0
# run ARGUMENTS…: cargo test, its output shown and kept.
run() {
    echo "cuda-proof: cargo test $*"
    { cargo test --locked --no-fail-fast "$@" --include-ignored 2>&1 || echo "cuda-proof: failed: cargo test $*"; } | tee -a "$log"
}
run -p candor-kernels --lib -- cuda::
for package in candor-kernels:kernels candor:runtime; do
    options=$(tests "${package#*:}")
    # The words of $options are options for cargo.
    # shellcheck disable=SC2086
    [ -z "$options" ] || run -p "${package%%:*}" $options --
done
run -p candor-tests --test parity -- cuda:: fallback::

# Training on a GPU has no tests without one, and still has to compile.
echo "cuda-proof: candor-tools with the feature cuda"
CANDOR_CUDA=none scripts/cuda-tools.sh check --quiet || result=1

count() {
    grep '^test result:' "$log" | grep -oE "[0-9]+ $1" | awk '{ sum += $1 } END { print sum + 0 }'
}
grep -q '^cuda-proof: failed' "$log" && result=1
if [ "$(count ignored)" != 0 ]; then
    echo "cuda-proof: $(count ignored) tests were left out (the reasons stand above)"
    result=1
fi
echo "$(count passed) passed, $(count failed) failed"
exit $result
