#!/bin/sh
# Proves the CUDA kernels on a GPU of this machine: the conformance suite, the model family against PyTorch's results, the doctor,
# and benchmarks of the published size. Writes gpu-check.json. A driver is all that the machine needs:
#
#     gpu-check.sh             builds, then runs
#     gpu-check.sh pack DIR    builds for a machine without compilers, into DIR (about 60 MB)
#     gpu-check.sh run DIR     runs what was packed
set -eu
cd "$(dirname "$0")/.."

say() { echo "gpu-check: $*"; }

pack() {
    folder=$1
    scripts/setup-cuda.sh thor
    say "building"
    CANDOR_CUDA=all cargo build --locked --release --quiet -p candor -p candor-tools --bins
    mkdir -p "$folder"
    cp target/release/candor target/release/candor-tools "$folder/"
    for test in candor-kernels:cuda candor-tests:parity; do
        built=$(CANDOR_CUDA=all cargo test --locked --no-run --message-format json -p "${test%%:*}" --test "${test#*:}" |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
        cp "$built" "$folder/test-${test#*:}"
    done
    strip "$folder"/candor "$folder"/candor-tools "$folder"/test-*
}

# one NAME COMMAND…: runs it, keeps what it printed, and says whether it ended well.
one() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" >"$results/$name.out" 2>"$results/$name.err"; then state=passed; else state=failed; fi
    printf '{"name": "%s", "state": "%s", "seconds": %d}\n' "$name" "$state" "$(($(date +%s) - start))" >>"$results/steps"
    say "$name: $state"
    [ "$state" = passed ] || tail -n 20 "$results/$name.err" "$results/$name.out"
}

run() {
    folder=$1
    results=$(mktemp -d)
    trap 'rm -rf "$results"' EXIT
    # The tests take the GPU in the place of the stand-in.
    export CANDOR_TEST_GPU=1 RUST_BACKTRACE=0
    one doctor "$folder/candor" doctor --device cuda --json
    one conformance "$folder/test-cuda" --test-threads 1
    one parity "$folder/test-parity" cuda --test-threads 1
    if command -v compute-sanitizer >/dev/null; then
        one sanitizer compute-sanitizer --error-exitcode 1 "$folder/test-cuda" --test-threads 1 several_at_once linear
    else
        say "no compute-sanitizer here: its run is left out"
    fi
    for weights in int4 int8; do
        one "synthesize-$weights" "$folder/candor-tools" synthesize --preset humanomni-0.5b --weights "$weights" \
            --output "$results/$weights"
        one "bench-$weights" "$folder/candor" bench --device cuda --model "$results/$weights" --positions 1024 \
            --prompt 128,512,1024 --repeat 5 --json
    done
    python3 - "$results" <<'PYTHON'
import json, sys
from pathlib import Path

results = Path(sys.argv[1])
steps = [json.loads(line) for line in (results / "steps").read_text().splitlines()]
for step in steps:
    text = (results / f"{step['name']}.out").read_text()
    if text.lstrip().startswith("{"):
        try:
            step["report"] = json.loads(text)
        except ValueError:
            step["output"] = text[-2000:]
    else:
        step["output"] = text[-2000:]
    if step["state"] != "passed":
        step["errors"] = (results / f"{step['name']}.err").read_text()[-2000:]
failed = [step["name"] for step in steps if step["state"] != "passed"]
Path("gpu-check.json").write_text(json.dumps({"failed": failed, "steps": steps}, indent=1) + "\n")
print(f"gpu-check: {len(steps) - len(failed)} passed, {len(failed)} failed; see gpu-check.json")
sys.exit(bool(failed))
PYTHON
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
