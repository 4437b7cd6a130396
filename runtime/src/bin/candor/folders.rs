//! Where the default models are.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// The model that `--model` names; else the environment variable `CANDOR_MODEL`; else `models/default`.
pub(crate) fn model(named: Option<PathBuf>) -> Result<PathBuf> {
    find(named, "--model", "CANDOR_MODEL", "default")
}

/// The verifier that `--verifier` names; else the environment variable `CANDOR_VERIFIER`; else
/// `models/default-verifier`.
pub(crate) fn verifier(named: Option<PathBuf>) -> Result<PathBuf> {
    find(named, "--verifier", "CANDOR_VERIFIER", "default-verifier")
}

/// `models/NAME` is looked for in the current folder, then in the folders above the program.
fn find(named: Option<PathBuf>, option: &str, variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(folder) = named.or_else(|| std::env::var_os(variable).map(PathBuf::from)) {
        if !folder.is_dir() {
            bail!("{} is not a folder; name a model's folder with {option} or {variable}", folder.display());
        }
        return Ok(folder);
    }
    let program = std::env::current_exe().and_then(|program| program.canonicalize()).unwrap_or_default();
    let above = program.ancestors().skip(1).map(|folder| folder.join("models").join(name));
    let mut places = std::iter::once(PathBuf::from("models").join(name)).chain(above);
    match places.find(|place| place.join("config.json").is_file()) {
        Some(folder) => Ok(folder),
        None => bail!("no models/{name} here or above the program; name one with {option} or {variable}"),
    }
}
