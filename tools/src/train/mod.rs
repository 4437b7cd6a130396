//! Training on the CPU, one file a part of the model: each is one `candor-tools train …` subcommand.

use clap::Subcommand;

/// `candor-tools train …`
#[derive(Subcommand)]
pub enum TrainCommand {}

/// Runs one `train` subcommand.
pub fn run(command: TrainCommand) -> anyhow::Result<()> {
    match command {}
}
