#!/bin/sh
# Proves the CUDA kernels on a GPU of this machine: the doctor, the conformance suite, benchmarks of the published size, the model
# family against PyTorch's results. Writes gpu-check.json after each step. A driver is all that the machine needs:
#
#     gpu-check.sh             builds, then runs
#     gpu-check.sh pack DIR    builds for a machine without compilers, into DIR (about 40 MB)
#     gpu-check.sh run DIR     runs what was packed
#
# Environment: GPU_CHECK_SECONDS, for all steps together (450); what there is no time for is named in gpu-check.json and fails. To try
# this script on the stand-in for the driver (docs/develop.md): PROFILE=dev builds quickly, GPU_CHECK_TESTS are the conformance and
# parity tests to run, GPU_CHECK_MODEL is the folder of a small model, GPU_CHECK_BENCH are other options for benchmarks.
set -eu
cd "$(dirname "$0")/.."

say() { echo "gpu-check: $*"; }

pack() {
    folder=$1
    profile=${PROFILE:-release}
    target=${CARGO_TARGET_DIR:-target}
    built=$target/$profile
    [ "$profile" != dev ] || built=$target/debug
    scripts/setup-cuda.sh thor
    say "building"
    CANDOR_CUDA=all cargo build --locked --profile "$profile" --quiet -p candor -p candor-tools --bins
    mkdir -p "$folder"
    cp "$built/candor" "$built/candor-tools" "$folder/"
    for test in candor-kernels:cuda candor-tests:parity; do
        program=$(CANDOR_CUDA=all cargo test --locked --no-run --message-format json -p "${test%%:*}" --test "${test#*:}" |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
        [ -n "$program" ] || { say "cargo made no test ${test#*:}" >&2; exit 1; }
        cp "$program" "$folder/test-${test#*:}"
    done
    # What the tests of the model family read.
    rm -rf "$folder/parity"
    cp -r tests/fixtures/parity "$folder/parity"
    strip "$folder"/candor "$folder"/candor-tools "$folder"/test-cuda "$folder"/test-parity
    # Some ways to another machine take no more than 64 MB.
    gzip -f "$folder"/candor-tools "$folder"/test-parity
}

# The end of a file as a text of JSON.
text_of() {
    printf '"'
    tail -n 60 "$1" | cut -c 1-400 | LC_ALL=C tr -cd '\11\12\40-\176' | sed 's/\\/\\\\/g; s/"/\\"/g; s/	/\\t/g; s/$/\\n/' | tr -d '\n'
    printf '"'
}

# one NAME COMMAND…: runs it, keeps what it printed, and says whether it ended well.
one() {
    name=$1
    shift
    start=$(date +%s)
    left=$((deadline - start))
    : >"$results/out"
    : >"$results/err"
    if [ "$left" -le 0 ]; then
        state="left out: no time"
    elif timeout "$left" "$@" >"$results/out" 2>"$results/err"; then
        state=passed
        # A choice of tests that no test has the name of proves nothing.
        ! grep -q '^test result: ok. 0 passed' "$results/out" || state="failed: no test ran"
    else
        state=failed
    fi
    say "$name: $state, $(($(date +%s) - start)) s"
    case $state in
        passed) passed=$((passed + 1)) ;;
        *)
            failures=$((failures + 1))
            failed="$failed${failed:+, }\"$name\""
            tail -n 20 "$results/err" "$results/out"
            ;;
    esac
    {
        [ ! -s "$results/steps" ] || printf ',\n'
        printf ' {"name": "%s", "state": "%s", "seconds": %d, ' "$name" "$state" "$(($(date +%s) - start))"
        # What says --json prints one object, in one line or in several.
        case $state:$(head -c 1 "$results/out") in
            passed:{) printf '"report": ' && cat "$results/out" ;;
            *) printf '"output": ' && text_of "$results/out" && printf ', "errors": ' && text_of "$results/err" ;;
        esac
        printf '}'
    } >>"$results/steps"
    {
        printf '{"failed": [%s],\n"steps": [\n' "$failed"
        cat "$results/steps"
        printf '\n]}\n'
    } >"$results/json"
    mv "$results/json" gpu-check.json
}

run() {
    folder=$(cd "$1" && pwd)
    results=$(mktemp -d)
    trap 'rm -rf "$results"' EXIT
    deadline=$(($(date +%s) + ${GPU_CHECK_SECONDS:-450}))
    passed=0 failures=0 failed=""
    for program in candor-tools test-parity; do
        gzip -dc "$folder/$program.gz" >"$results/$program"
        chmod +x "$results/$program"
    done
    # The tests take the GPU in the place of the stand-in. Those that need the stand-in itself are left out.
    export CANDOR_TEST_GPU=1 CANDOR_TEST_FIXTURES="$folder/parity" RUST_BACKTRACE=0
    tests="--test-threads 1 --skip runs:: --skip alone::"
    # The words of $tests and of the variables are options.
    # shellcheck disable=SC2086
    {
        one doctor "$folder/candor" doctor --device cuda --json
        one conformance "$folder/test-cuda" $tests ${GPU_CHECK_TESTS-}
        for weights in int4 int8; do
            model=${GPU_CHECK_MODEL:-$results/$weights}
            [ -d "$model" ] || one "synthesize-$weights" "$results/candor-tools" synthesize --preset humanomni-0.5b \
                --weights "$weights" --output "$model"
            one "bench-$weights" "$folder/candor" bench --device cuda --model "$model" --json \
                ${GPU_CHECK_BENCH:---positions 1024 --prompt 128,512,1024 --repeat 5}
            [ -n "${GPU_CHECK_MODEL-}" ] || rm -rf "$model"
        done
        one parity "$results/test-parity" $tests ${GPU_CHECK_TESTS:-cuda}
        if command -v compute-sanitizer >/dev/null; then
            one sanitizer compute-sanitizer --error-exitcode 1 "$folder/test-cuda" --test-threads 1 several_at_once linear
        else
            say "no compute-sanitizer here: its run is left out"
        fi
    }
    say "$passed passed, $failures failed; see gpu-check.json"
    [ "$failures" = 0 ]
}

case ${1-} in
    pack) pack "${2:?a folder}" ;;
    run) run "${2:?a folder}" ;;
    "")
        pack target/gpu-check
        run target/gpu-check
        ;;
    *)
        say "usage: gpu-check.sh [pack DIR | run DIR]" >&2
        exit 2
        ;;
esac
