//! The command line: `candor --help` explains itself. One file a subcommand.
#![forbid(unsafe_code)]

mod trace;

use clap::{Parser, Subcommand};

/// Says which emotion a camera sees and why, and presents only a reason it has verified.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Trace(trace::Trace),
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match Cli::parse().command {
        Command::Trace(args) => trace::run(&args),
    }
}
