//! Copies of model folders with other weights.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use candor::manifest::{self, Manifest};

use crate::train::checkpoint::write_atomically;

/// Refuses a folder that holds anything; `option` is what names it.
pub fn check_empty(folder: &Path, option: &str) -> anyhow::Result<()> {
    let failed = || format!("{}", folder.display());
    if folder.exists() && (!folder.is_dir() || std::fs::read_dir(folder).with_context(failed)?.next().is_some()) {
        bail!("{} is not empty; name a new folder with {option}", folder.display());
    }
    Ok(())
}

/// Copies everything but the manifest and the files named.
pub fn copy_files(from: &Path, to: &Path, without: &[PathBuf]) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        if path.is_dir() {
            std::fs::create_dir_all(to.join(name))?;
            copy_files(&path, &to.join(name), &[])?;
        } else if !without.contains(&path) && name != manifest::FILE_NAME {
            let target = to.join(name);
            let mut part = target.clone().into_os_string();
            part.push(".part");
            let copied = std::fs::copy(&path, &part).and_then(|_| std::fs::rename(&part, &target));
            copied.with_context(|| format!("{} to {}", path.display(), target.display()))?;
        }
    }
    Ok(())
}

/// Writes the manifest of `model` into `folder`, which is to lie at `out`, with the digests of the files there.
pub fn copy_manifest(model: &Path, folder: &Path, out: &Path) -> anyhow::Result<()> {
    let mut manifest = Manifest::open(model)?;
    // The verifier is named by a path from the model's folder. Beside it, the same path leads there.
    let beside = |path: &Path| std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_path_buf));
    if let Some(verifier) = manifest.verifier_folder()
        && beside(model) != beside(out)
    {
        manifest.model.verifier = Some(verifier.canonicalize().unwrap_or(verifier));
    }
    manifest.files.clear();
    let text = toml::to_string_pretty(&manifest)?;
    write_atomically(&folder.join(manifest::FILE_NAME), text.as_bytes())?;
    Manifest::seal(folder)?;
    Ok(())
}
