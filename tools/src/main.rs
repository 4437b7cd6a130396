//! `candor-tools --help` explains itself. The subcommands live in the library, one module each.
#![forbid(unsafe_code)]

use candor_tools::data::{self, DataCommand};
use candor_tools::train::{self, TrainCommand};
use clap::{Parser, Subcommand};

/// Makes data sets, trains and evaluates Candor's models. Runs on workstations, never on the device.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a data set.
    #[command(subcommand)]
    Data(DataCommand),
    /// Train a part of the model.
    #[command(subcommand)]
    Train(TrainCommand),
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match Cli::parse().command {
        Command::Data(command) => data::run(command),
        Command::Train(command) => train::run(command),
    }
}
