//! Data sets: what the trainers read, made from what the user downloaded.

use clap::Subcommand;

/// `candor-tools data …`
#[derive(Subcommand)]
pub enum DataCommand {}

/// Runs one `data` subcommand.
pub fn run(command: DataCommand) -> anyhow::Result<()> {
    match command {}
}
