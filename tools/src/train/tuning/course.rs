//! A run's way over its steps, and what stays of it whatever happens: one process a folder, a checkpoint now and then, a
//! log without gaps, and errors that say from where the same command goes on.
//!
//! What a step does follows from the seed and its number alone, so a run that was cut off at any moment comes to the
//! result of one that was not, bit for bit.

use super::settings::TuningArgs;
use crate::train::checkpoint::{self, write_atomically};
use crate::train::curves::RunLog;
use crate::train::optimiser::AdamW;
use crate::train::policy::Policy;
use crate::train::tower::stop_on_interrupt;
use anyhow::{Context, anyhow, ensure};
use candor::message::one_line;
use candor::text::rollout::RolloutError;
use serde_json::{Map, Value, json};
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Steps between two lines on the screen.
const SAY_EVERY: u64 = 10;
/// What is said of a run beside its numbers.
const ABOUT: &str = "run.json";

/// What may change in mid-run: folders may be moved, and what they hold is known by digests.
const PATHS: [&str; 3] = ["model", "verifier", "data"];

/// The run was stopped before its last step, after a checkpoint.
#[derive(Debug, thiserror::Error)]
#[error("stopped at step {step} of {steps}; the same command goes on from there")]
pub struct Stopped {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Stopped {
    /// What the program ends with then, as shells have it for an interrupt.
    pub const EXIT_CODE: u8 = 130;
}

/// The training has left what numbers can hold. It does so again from the same checkpoint.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Diverged(pub String);

/// Holds a run's folder for this process. The system lets go of it when the process ends, however it ends.
pub struct RunLock(#[allow(dead_code)] File);

impl RunLock {
    /// Makes the folder if it is not there, and takes it.
    ///
    /// # Errors
    /// Another process has it.
    pub fn take(folder: &Path) -> anyhow::Result<RunLock> {
        std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        let path = folder.join("lock");
        let open = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let mut file = open.with_context(|| format!("{}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let owner = std::fs::read_to_string(&path).unwrap_or_default();
                return Err(anyhow!(
                    "{} is in use by process {}; wait for it, or name another folder with --out",
                    folder.display(),
                    owner.trim()
                ));
            }
            // Some network file systems have no locks; the run is worth more than the guard.
            Err(TryLockError::Error(error)) => log::warn!("{}: cannot be locked: {error}", path.display()),
        }
        // For the message above only, so a full disk does not matter here.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(RunLock(file))
    }
}

/// What a run is, for the checkpoint and for readers.
pub struct Described {
    /// All settings that decide the result.
    pub recipe: String,
    /// What else must not change in mid-run: sha256 of the verifier, number of entries and the like.
    pub about: Value,
    /// Steps in all.
    pub steps: u64,
    /// Updates a step.
    pub updates: u64,
}

/// A run on its way.
pub struct Course<'a> {
    folder: PathBuf,
    args: &'a TuningArgs,
    described: Described,
    /// The measurements.
    pub log: RunLog,
    /// Steps done when this process took over.
    pub done: u64,
    kept: u64,
    kept_at: Instant,
    stop: &'static AtomicBool,
}

impl<'a> Course<'a> {
    /// Opens a run in a folder that this process holds: reads the last checkpoint, if there is one, into `policy` and
    /// `optimiser`.
    pub fn open(
        folder: &Path,
        args: &'a TuningArgs,
        described: Described,
        policy: &mut Policy,
        optimiser: &mut AdamW,
    ) -> anyhow::Result<Course<'a>> {
        remove_parts(folder).with_context(|| format!("{}", folder.display()))?;
        let state = folder.join("state.safetensors");
        let resumed = checkpoint::resume(&state, &described.recipe, policy.trained_mut(), optimiser)?;
        let done = optimiser.steps / described.updates.max(1);
        keep_about(folder, &described, resumed)?;
        let log = RunLog::open(folder, done, described.steps)?;
        let steps: Vec<u64> = log.lines().iter().filter_map(|line| line.get("step")?.as_u64()).collect();
        if !steps.iter().copied().eq(1..=done) {
            log.say(&format!(
                "metrics.jsonl has {} of the {done} steps that the checkpoint has; the curves will show a gap",
                steps.len()
            ));
        }
        let stop = stop_on_interrupt();
        Ok(Course { folder: folder.into(), args, described, log, done, kept: done, kept_at: Instant::now(), stop })
    }

    /// Does the steps that are left. `step` does one and says what there is to log, `summary` puts that in a line, and
    /// `write` writes what a reader of the folder wants to see; its last argument says whether the run ends or stops.
    ///
    /// # Errors
    /// [`Stopped`] where the run was interrupted; what went wrong, and what stays.
    pub fn go(
        &mut self,
        policy: &mut Policy,
        optimiser: &mut AdamW,
        mut step: impl FnMut(u64, &mut Policy, &mut AdamW) -> anyhow::Result<Map<String, Value>>,
        summary: impl Fn(&Map<String, Value>) -> String,
        mut write: impl FnMut(&Policy, &RunLog, bool) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (steps, mut at) = (self.described.steps, self.done);
        loop {
            let told = self.stop.load(Ordering::Relaxed) || self.args.stop_after.is_some_and(|stop| at >= stop);
            let ends = told || at == steps;
            if at > self.kept && (ends || self.kept_at.elapsed() >= self.args.save_every()) {
                let kept = self.keep(at, policy, optimiser).and_then(|()| write(policy, &self.log, ends));
                kept.with_context(|| format!("step {at} could not be kept ({})", resumes(self.kept)))?;
            }
            if at == steps {
                return Ok(());
            }
            if told {
                return Err(Stopped { step: at, steps }.into());
            }
            let line = step(at, policy, optimiser).map_err(|error| self.failed(at, error, policy, optimiser))?;
            at += 1;
            self.log.show(at, summary(&line));
            if at.is_multiple_of(SAY_EVERY) || at == 1 || at == steps {
                self.log.say(&format!("step {at}/{steps} {}", summary(&line)));
            }
            let logged = self.log.write(at, Value::Object(line));
            logged.with_context(|| format!("step {at} could not be logged ({})", resumes(self.kept)))?;
        }
    }

    fn keep(&mut self, step: u64, policy: &Policy, optimiser: &AdamW) -> anyhow::Result<()> {
        // The log goes first: a checkpoint must not know of steps that it lacks.
        self.log.sync()?;
        checkpoint::save(&self.folder.join("state.safetensors"), &self.described.recipe, policy.trained(), optimiser)?;
        (self.kept, self.kept_at) = (step, Instant::now());
        Ok(())
    }

    /// What to say of a step that failed, after keeping those before it.
    fn failed(&mut self, step: u64, error: anyhow::Error, policy: &Policy, optimiser: &AdamW) -> anyhow::Error {
        let diverged = error.chain().any(|cause| cause.is::<Diverged>() || cause.is::<RolloutError>());
        let what = one_line(error.as_ref());
        if diverged {
            // Weights that lead to this are no better than those of the last checkpoint, which stays.
            let kept = match self.kept {
                0 => "no checkpoint was written".to_owned(),
                kept => format!("the checkpoint of step {kept} stays as it is"),
            };
            return anyhow!("step {}: {what}; start again with a lower --rate and another --out ({kept})", step + 1);
        }
        // Between two updates of one step there is nothing that could be gone on from.
        if step > self.kept
            && optimiser.steps == step * self.described.updates
            && let Err(error) = self.keep(step, policy, optimiser)
        {
            log::warn!("step {step} could not be kept: {}", one_line(error.as_ref()));
        }
        anyhow!("step {}: {what}; {}", step + 1, resumes(self.kept))
    }
}

/// Removes what a run that was killed in the midst of writing has left.
fn remove_parts(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "part") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// From where a run goes on.
fn resumes(kept: u64) -> String {
    match kept {
        0 => "put that right and the same command starts anew".to_owned(),
        kept => format!("put that right and the same command goes on from step {kept}, with nothing before it lost"),
    }
}

/// Writes `run.json` for a new run; holds that of one that goes on against what there is now.
fn keep_about(folder: &Path, described: &Described, resumed: bool) -> anyhow::Result<()> {
    let path = folder.join(ABOUT);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) if resumed => text,
        Err(error) if resumed && error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{}", path.display()));
        }
        _ => {
            let mut about = described.about.as_object().cloned().unwrap_or_default();
            about.insert("steps".into(), json!(described.steps));
            about.insert("recipe".into(), json!(described.recipe));
            about.insert("candor_tools".into(), json!(env!("CARGO_PKG_VERSION")));
            let text = format!("{}\n", serde_json::to_string_pretty(&about)?);
            return Ok(write_atomically(&path, text.as_bytes())?);
        }
    };
    let before: Map<String, Value> = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    for (key, now) in
        described.about.as_object().into_iter().flatten().filter(|(key, _)| !PATHS.contains(&key.as_str()))
    {
        let before = before.get(key).unwrap_or(&Value::Null);
        ensure!(
            before == now,
            "{}: the run began with {key} {before}, which is now {now}; put it back, or name another folder with --out",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_has_one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let held = RunLock::take(folder.path()).unwrap();
        let error = RunLock::take(folder.path()).err().unwrap().to_string();
        assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
        drop(held);
        RunLock::take(folder.path()).unwrap();
    }

    #[test]
    fn what_must_not_change_is_held_against_what_was() {
        let folder = tempfile::tempdir().unwrap();
        let described = |sha: &str| Described {
            recipe: "r".into(),
            about: json!({"verifier_sha256": sha, "verifier": format!("in/{sha}")}),
            steps: 3,
            updates: 1,
        };
        keep_about(folder.path(), &described("a"), true).unwrap(); // begun by an older program: now it is known
        keep_about(folder.path(), &described("a"), true).unwrap();
        let error = keep_about(folder.path(), &described("b"), true).unwrap_err().to_string();
        assert!(error.contains("verifier_sha256 \"a\", which is now \"b\""), "{error}");
        keep_about(folder.path(), &described("b"), false).unwrap();
        keep_about(folder.path(), &described("b"), true).unwrap();
    }
}
