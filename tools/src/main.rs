//! `candor-tools --help` explains itself.
fn main() {}
