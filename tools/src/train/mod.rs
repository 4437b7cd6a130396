//! Training on the CPU, one file a part of the model: each is one `candor-tools train …` subcommand.

pub mod checkpoint;
pub mod curves;
pub mod decoder;
pub mod encoder;
pub mod faces;
pub mod ops;
pub mod optimiser;
pub mod parameters;
pub mod schedule;
pub mod tower;
pub mod verifier;

use clap::Subcommand;

/// `candor-tools train …`
#[derive(Subcommand)]
pub enum TrainCommand {
    /// Tune a vision tower on photographs of faces.
    Tower(tower::TowerArgs),
    /// Tune a sentence encoder as the verifier.
    Verifier(verifier::VerifierArgs),
}

/// Runs one `train` subcommand.
pub fn run(command: TrainCommand) -> anyhow::Result<()> {
    match command {
        TrainCommand::Tower(args) => tower::run(&args),
        TrainCommand::Verifier(args) => verifier::run(&args),
    }
}
