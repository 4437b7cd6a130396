//! What reward fine-tuning and supervised tuning of a model's decoder share: options, prompts, and the way of a run from
//! its folder over its steps to its report.

pub mod course;
pub mod prompts;
pub mod report;
pub mod settings;

use super::policy::Policy;
use crate::merge;
use candor::model::adapter::WEIGHTS_FILE;
use settings::{InputArgs, TuningArgs};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Does a piece of work, and makes an error of a panic in it: a mistake in the program must not cost what a run has
/// come to.
pub fn caught<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(anyhow::anyhow!("a mistake in the program: {}", said.unwrap_or("a thread panicked")))
    })
}

/// Writes what has been trained: a PEFT folder, or with `--full` a model folder. The latter is as large as the model, so
/// it is written when a run comes to its end or is stopped, not with every checkpoint.
pub fn write_result(input: &InputArgs, tuning: &TuningArgs, policy: &Policy, ends: bool) -> anyhow::Result<()> {
    if !tuning.full {
        return policy.write_factors(&input.out, &input.model.display().to_string());
    }
    if !ends {
        return Ok(());
    }
    let trained = policy.tensors().map(|(name, _, values)| (name.to_owned(), values.to_vec())).collect();
    merge::write(&input.model, &input.out.join("model"), trained).map(|_| ())
}

/// What [`write_result`] writes, for a message.
pub fn result_name(tuning: &TuningArgs) -> &'static str {
    if tuning.full { "model" } else { WEIGHTS_FILE }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn a_panic_on_a_thread_is_an_error() {
        let work = |i: usize| {
            caught(|| {
                assert!(i != 5, "piece {i} is bad");
                Ok(i)
            })
        };
        let all: anyhow::Result<Vec<usize>> = (0..8).into_par_iter().map(work).collect();
        assert_eq!(all.unwrap_err().to_string(), "a mistake in the program: piece 5 is bad");
        assert_eq!(caught(|| Ok(3)).unwrap(), 3);
    }
}
