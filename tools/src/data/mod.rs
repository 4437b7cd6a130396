//! Data sets: what the trainers read, made from what the user downloaded.

pub mod cold_start;
pub mod faces;
pub mod rationale;
pub mod tokenizer;

use clap::Subcommand;

/// `candor-tools data …`
#[derive(Subcommand)]
pub enum DataCommand {
    /// Grounded rationales, verifier sentences and a tokenizer from labelled faces with measured cues.
    Faces(cold_start::FacesArgs),
}

/// Runs one `data` subcommand.
pub fn run(command: DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Faces(args) => cold_start::run(&args),
    }
}
