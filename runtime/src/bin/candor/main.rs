//! The command line: `candor --help` explains itself. One file a subcommand.
#![forbid(unsafe_code)]

mod bench;
mod doctor;
mod folders;
mod machine;
mod memory;
mod model;
mod plan;
mod terminal;
mod trace;
mod verify;
#[cfg(feature = "media")]
mod watch;

use std::process::ExitCode;

use candor::message::exit_code;
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
    /// Say for each window of a camera or file which emotion it shows and why.
    #[cfg(feature = "media")]
    Watch(watch::WatchArgs),
    /// Read a rationale from standard input and say whether it supports an emotion.
    Verify(verify::VerifyArgs),
    /// Check or list the files of a model.
    Model(model::ModelArgs),
    Trace(trace::Trace),
    Plan(plan::PlanArgs),
    Bench(bench::Bench),
    Doctor(doctor::Doctor),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let result = match Cli::parse().command {
        #[cfg(feature = "media")]
        Command::Watch(args) => watch::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Model(args) => model::run(args),
        Command::Trace(args) => trace::run(&args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(&args),
    };
    exit_code("candor", result)
}
