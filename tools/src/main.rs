//! `candor-tools --help` explains itself. The subcommands live in the library, one module each.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use candor::message::exit_code;
use candor_tools::data::{self, DataCommand};
use candor_tools::eval::{self, EvalArgs};
use candor_tools::eval_verifier::{self, EvalVerifierArgs};
use candor_tools::merge::{self, MergeArgs};
use candor_tools::quantize::{self, QuantizeArgs};
use candor_tools::rate::{self, RateArgs};
use candor_tools::reward::command::{self as reward, RewardArgs};
use candor_tools::reward::server::{self as reward_server, RewardServerArgs};
use candor_tools::synthesize::{self, SynthesizeArgs};
use candor_tools::train::tuning::course::Stopped;
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
    /// Fold an adapter into a model's weights.
    Merge(MergeArgs),
    /// Store a model's weights as whole numbers of four or eight bits, and measure what that does.
    Quantize(QuantizeArgs),
    /// Write a model folder of a published size with random weights, to measure speed and memory with.
    Synthesize(SynthesizeArgs),
    /// Measure a model on labelled faces.
    Eval(EvalArgs),
    /// Measure a verifier on sentences whose emotions are known.
    EvalVerifier(EvalVerifierArgs),
    /// Pay completions as reward fine-tuning does.
    Reward(RewardArgs),
    /// Serve the rewards over HTTP to trainers that run elsewhere.
    RewardServer(RewardServerArgs),
    /// Serve a page where people compare two explanations of the same clip.
    Rate(RateArgs),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let result = match Cli::parse().command {
        Command::Data(command) => data::run(command),
        Command::Train(command) => train::run(command),
        Command::Merge(args) => merge::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Synthesize(args) => synthesize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::EvalVerifier(args) => eval_verifier::run(&args),
        Command::Reward(args) => reward::run(&args),
        Command::RewardServer(args) => reward_server::run(&args),
        Command::Rate(args) => rate::run(&args),
    };
    match result {
        Err(error) if error.is::<Stopped>() => {
            eprintln!("candor-tools: {error}");
            ExitCode::from(Stopped::EXIT_CODE)
        }
        result => exit_code("candor-tools", result),
    }
}
