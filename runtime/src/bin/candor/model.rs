//! `candor model`: holds a model's files against its manifest.

use std::path::PathBuf;

use anyhow::Result;
use candor::manifest::Manifest;
use candor::message::say;
use clap::{Args, Subcommand};

#[derive(Args)]
pub(crate) struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Check every file in the folder against the sha256 in its candor.toml.
    Verify {
        /// The model's folder.
        folder: PathBuf,
    },
    /// Write the sha256 of every file in the folder into its candor.toml.
    Seal {
        /// The model's folder.
        folder: PathBuf,
    },
}

pub(crate) fn run(args: ModelArgs) -> Result<()> {
    let manifest = match args.command {
        ModelCommand::Verify { folder } => {
            let manifest = Manifest::open(&folder)?;
            manifest.check_files()?;
            manifest
        }
        ModelCommand::Seal { folder } => Manifest::seal(&folder)?,
    };
    let (model, identity) = (&manifest.model, manifest.identity()?);
    say(format_args!(
        "{} {}: {} files are as listed, sha256 {identity}",
        model.name,
        model.version,
        manifest.files.len()
    ))?;
    Ok(())
}
