//! `candor-tools eval-verifier`: how well a verifier reads sentences whose emotions are known, through the runtime.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use candor::device::Choice;
use candor::manifest::{Manifest, ManifestError};
use candor::message::say;
use candor::verify::{SentenceClassifier, Verifier};
use candor::with_device;
use candor_kernels::Device;
use clap::Args;
use serde::Serialize;

use crate::sentences::{LABELS, Labelled, above, agreement, by_rule, macro_f1, read_sentences};
use crate::workers;

/// Decides a label where the verifier's manifest names no threshold.
const DEFAULT_THRESHOLD: f32 = 0.2;

/// `candor-tools eval-verifier`
#[derive(Args)]
pub struct EvalVerifierArgs {
    /// The verifier's folder.
    #[arg(long)]
    pub verifier: PathBuf,
    /// Sentences as GoEmotions has them: text, comma-separated label ids, and anything behind.
    #[arg(long)]
    pub tsv: PathBuf,
    /// End with one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Threads, each with a verifier of its own over the same mapped weights.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the verifier computes: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Choice::Auto)]
    pub device: Choice,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct VerifierMetrics {
    /// Sentences.
    pub n: usize,
    /// Mean F1 of the 28 labels, a label being read where its probability is above the threshold.
    pub macro_f1: f64,
    /// The same under the paper's rule (arXiv 2510.23506): above 0.1, at most two, else the most probable.
    pub macro_f1_paper_rule: f64,
    /// Share of sentences that are read as meant by the paper's rule, see [`agreement`].
    pub agreement: f64,
}

/// Runs `candor-tools eval-verifier`.
pub fn run(args: &EvalVerifierArgs) -> anyhow::Result<()> {
    ensure!(args.threads > 0, "--threads must be at least 1");
    let sentences = read_sentences(&args.tsv)?;
    let threshold = threshold(&args.verifier)?;
    let probabilities = with_device!(args.device.open(Some(1))?, device => read_on(&device, args, &sentences))?;
    let metrics = measure(&sentences, &probabilities, threshold)?;
    if args.json {
        say(serde_json::to_string(&metrics)?)?;
    } else {
        say(format_args!("sentences                 {}", metrics.n))?;
        say(format_args!("macro-F1, threshold {threshold:.2}  {:.4}", metrics.macro_f1))?;
        say(format_args!("macro-F1, paper's rule    {:.4}", metrics.macro_f1_paper_rule))?;
        say(format_args!("agreement                 {:.4}", metrics.agreement))?;
    }
    Ok(())
}

/// What the verifier reads in each sentence.
fn read_on<D: Device>(
    device: &D,
    args: &EvalVerifierArgs,
    sentences: &[Labelled],
) -> anyhow::Result<Vec<[f32; LABELS]>> {
    let open = || Ok(Verifier::open(&args.verifier, device.clone())?);
    let read = |verifier: &mut Verifier<D>, index: usize| -> anyhow::Result<[f32; LABELS]> {
        let mut read = verifier.classify(&[sentences[index].text.as_str()])?;
        read.pop().with_context(|| format!("sentence {}: the verifier gave nothing", index + 1))
    };
    workers::run(sentences.len(), args.threads, "sentences", open, read)
}

/// The threshold in the verifier's manifest.
fn threshold(folder: &Path) -> Result<f32, ManifestError> {
    Ok(Manifest::open(folder)?.verifier.threshold.unwrap_or(DEFAULT_THRESHOLD))
}

fn measure(sentences: &[Labelled], probabilities: &[[f32; LABELS]], threshold: f32) -> anyhow::Result<VerifierMetrics> {
    let meant: Vec<_> = sentences.iter().map(|sentence| sentence.labels).collect();
    let ruled = by_rule(probabilities)?;
    Ok(VerifierMetrics {
        n: sentences.len(),
        macro_f1: macro_f1(&above(probabilities, threshold), &meant),
        macro_f1_paper_rule: macro_f1(&ruled, &meant),
        agreement: agreement(&ruled, &meant),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn with(values: &[(usize, f32)]) -> [f32; 28] {
        let mut probabilities = [0.01; 28];
        values.iter().for_each(|&(id, p)| probabilities[id] = p);
        probabilities
    }

    #[test]
    fn f1_is_counted_by_label() {
        let labelled =
            |ids: &[usize]| Labelled { text: String::new(), labels: std::array::from_fn(|id| ids.contains(&id)) };
        let lines = [labelled(&[17]), labelled(&[17, 2]), labelled(&[27])];
        // At 0.2: joy; joy and not anger; anger instead of neutral. By the rule: the same, and anger in b.
        let probabilities = [with(&[(17, 0.9)]), with(&[(17, 0.6), (2, 0.15)]), with(&[(2, 0.7)])];
        let metrics = measure(&lines, &probabilities, 0.2).unwrap();
        assert!((metrics.macro_f1 - 1.0 / 28.0).abs() < 1e-9, "{metrics:?}");
        assert!((metrics.macro_f1_paper_rule - (1.0 + 2.0 / 3.0) / 28.0).abs() < 1e-9, "{metrics:?}");
        assert!((metrics.agreement - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_threshold_is_the_manifests() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(threshold(folder.path()).unwrap(), DEFAULT_THRESHOLD);
        std::fs::write(folder.path().join("candor.toml"), "[verifier]\nthreshold = 2.0").unwrap();
        assert!(threshold(folder.path()).unwrap_err().to_string().contains("not within 0 to 1"));
        std::fs::write(folder.path().join("candor.toml"), "[verifier]\nthreshold = 0.25").unwrap();
        assert_eq!(threshold(folder.path()).unwrap(), 0.25);
    }
}
