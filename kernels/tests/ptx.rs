#![allow(missing_docs)]
#[path = "ptx/mod.rs"]
mod ptx;
