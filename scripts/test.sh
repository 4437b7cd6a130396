#!/bin/sh
# Every test of the workspace, documentation examples too; all of them run even when one fails.
set -eu
cd "$(dirname "$0")/.."
if cargo nextest --version >/dev/null 2>&1; then
    result=0
    cargo nextest run --locked --workspace --no-fail-fast || result=$?
    cargo test --locked --workspace --doc --no-fail-fast || result=$?
    exit "$result"
fi
exec cargo test --locked --workspace --no-fail-fast
