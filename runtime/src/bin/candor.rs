//! The command line: `candor --help` explains itself.
fn main() {}
