#!/bin/sh
# A wrapper around rustc (RUSTC_WRAPPER) for builds of candor-tools with the feature `cuda`. candle-core asks for cudarc's
# feature `dynamic-linking`, with which a program does not even start where there is no driver, and which cudarc refuses
# beside the workspace's `dynamic-loading`. This leaves that one feature out of cudarc; all else is as Cargo has it.
set -eu
if [ "${CARGO_PKG_NAME-}" = cudarc ]; then
    left=$#
    while [ "$left" -gt 0 ]; do
        if [ "$1" = --cfg ] && [ "${2-}" = 'feature="dynamic-linking"' ]; then
            shift 2
            left=$((left - 2))
        else
            set -- "$@" "$1"
            shift
            left=$((left - 1))
        fi
    done
fi
exec "$@"
