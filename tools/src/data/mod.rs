//! Data sets: what the trainers read, made from what the user downloaded.

pub mod cold_start;
pub mod faces;
pub mod hasty;
pub mod rationale;
pub mod tokenizer;

use clap::Subcommand;

use crate::dataset::labels::{dfew, emer, mafw};
use crate::dataset::prepare;

/// `candor-tools data …`
#[derive(Subcommand)]
pub enum DataCommand {
    /// Grounded rationales, verifier sentences and a tokenizer from labelled faces with measured cues.
    Faces(cold_start::FacesArgs),
    /// A data set from DFEW's csv files.
    Dfew(dfew::DfewArgs),
    /// A data set from MAFW's lists or its sheet.
    Mafw(mafw::MafwArgs),
    /// A data set with rationales from EMER's reasons.
    Emer(emer::EmerArgs),
    /// Look at every clip of a data set, keep what the vision tower makes of it, and list the broken ones.
    Features(prepare::FeaturesArgs),
}

/// Runs one `data` subcommand.
pub fn run(command: DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Faces(args) => cold_start::run(&args),
        DataCommand::Dfew(args) => dfew::run(&args),
        DataCommand::Mafw(args) => mafw::run(&args),
        DataCommand::Emer(args) => emer::run(&args),
        DataCommand::Features(args) => prepare::run(&args),
    }
}
