//! What the whole-system tests share: where fixtures lie and how the binaries are run.
#![forbid(unsafe_code)]
