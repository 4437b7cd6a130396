//! Training, one file a part of the model: each is one `candor-tools train …` subcommand.

pub mod checkpoint;
pub mod curves;
pub mod decoder;
pub mod encoder;
pub mod export;
pub mod faces;
pub mod features;
pub mod gate_text;
#[cfg(test)]
pub(crate) mod gradient_check;
pub mod grpo;
pub mod layers;
pub mod lora;
pub mod ops;
pub mod optimiser;
pub mod parameters;
pub mod policy;
pub mod products;
pub mod projector;
pub mod schedule;
pub mod sft;
#[cfg(test)]
mod sft_tests;
pub mod student;
pub mod tower;
pub mod tune;
pub mod tuning;
pub mod verifier;

use clap::Subcommand;

/// `candor-tools train …`
#[derive(Subcommand)]
pub enum TrainCommand {
    /// Tune a vision tower on photographs of faces.
    Tower(tower::TowerArgs),
    /// Tune a sentence encoder as the verifier.
    Verifier(verifier::VerifierArgs),
    /// Train the projector, the gate and the decoder on rationales, behind a frozen tower.
    Sft(sft::SftArgs),
    /// Tune a model's decoder on a list of clips with rationales and answers.
    Tune(Box<tune::settings::TuneArgs>),
    /// Fine-tune a model's decoder with rewards (GRPO).
    Grpo(Box<grpo::settings::GrpoArgs>),
}

/// Runs one `train` subcommand.
pub fn run(command: TrainCommand) -> anyhow::Result<()> {
    match command {
        TrainCommand::Tower(args) => tower::run(&args),
        TrainCommand::Verifier(args) => verifier::run(&args),
        TrainCommand::Sft(args) => sft::run(&args),
        TrainCommand::Tune(args) => tune::run(&args),
        TrainCommand::Grpo(args) => grpo::run(&args),
    }
}
