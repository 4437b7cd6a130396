//! `candor-tools eval-verifier`: how well a verifier reads sentences whose emotions are known, through the runtime.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use candor::verify::emotions::GO_EMOTIONS;
use candor::verify::{SentenceClassifier, Verifier, read_labels};
use candor_kernels::cpu::CpuDevice;
use clap::Args;
use serde::Serialize;

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
}

/// A sentence and the ids of its labels.
type Line = (String, Vec<usize>);

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct VerifierMetrics {
    /// Sentences.
    pub n: usize,
    /// Mean F1 of the 28 labels, a label being read where its probability reaches the threshold.
    pub macro_f1: f64,
    /// The same under the paper's rule (arXiv 2510.23506): above 0.1, at most two, else the most probable.
    pub macro_f1_paper_rule: f64,
    /// Share of sentences in which the paper's rule reads at least one of the labels they have.
    pub agreement: f64,
}

/// Runs `candor-tools eval-verifier`.
pub fn run(args: &EvalVerifierArgs) -> anyhow::Result<()> {
    ensure!(args.threads > 0, "--threads must be at least 1");
    let lines = read_lines(&args.tsv)?;
    let threshold = threshold(&args.verifier)?;
    let open = || Ok(Verifier::open(&args.verifier, CpuDevice::new(Some(1)))?);
    let read = |verifier: &mut Verifier<CpuDevice>, index: usize| -> anyhow::Result<[f32; 28]> {
        let mut read = verifier.classify(&[lines[index].0.as_str()])?;
        read.pop().with_context(|| format!("line {}: the verifier gave nothing", index + 1))
    };
    let probabilities = workers::run(lines.len(), args.threads, "sentences", open, read)?;
    let metrics = measure(&lines, &probabilities, threshold)?;
    if args.json {
        println!("{}", serde_json::to_string(&metrics)?);
    } else {
        println!("sentences                 {}", metrics.n);
        println!("macro-F1, threshold {threshold:.2}  {:.4}", metrics.macro_f1);
        println!("macro-F1, paper's rule    {:.4}", metrics.macro_f1_paper_rule);
        println!("agreement                 {:.4}", metrics.agreement);
    }
    Ok(())
}

/// `threshold` in the `[verifier]` table of the verifier's candor.toml.
fn threshold(folder: &Path) -> anyhow::Result<f32> {
    let path = folder.join(candor::manifest::FILE_NAME);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(DEFAULT_THRESHOLD),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let manifest: toml::Table = text.parse().with_context(|| format!("{}", path.display()))?;
    match manifest.get("verifier").and_then(|verifier| verifier.get("threshold")) {
        None => Ok(DEFAULT_THRESHOLD),
        Some(value) => match value.as_float() {
            Some(threshold) if (0.0..=1.0).contains(&threshold) => Ok(threshold as f32),
            _ => bail!("{}: verifier.threshold must be a number from 0 to 1, not {value}", path.display()),
        },
    }
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let place = || format!("{}, line {}", path.display(), number + 1);
        let mut fields = line.split('\t');
        let (Some(sentence), Some(ids)) = (fields.next(), fields.next()) else {
            bail!("{}: no tab between the text and its labels", place());
        };
        let mut labels = Vec::new();
        for id in ids.split(',') {
            match id.trim().parse() {
                Ok(id) if id < GO_EMOTIONS.len() => labels.push(id),
                _ => bail!("{}: {id:?} is no label id from 0 to {}", place(), GO_EMOTIONS.len() - 1),
            }
        }
        lines.push((sentence.to_owned(), labels));
    }
    ensure!(!lines.is_empty(), "{} holds no sentences", path.display());
    Ok(lines)
}

fn measure(lines: &[Line], probabilities: &[[f32; 28]], threshold: f32) -> anyhow::Result<VerifierMetrics> {
    let mut counts = [Counts::default(), Counts::default()];
    let mut agreeing = 0;
    for ((_, labels), probabilities) in lines.iter().zip(probabilities) {
        let above: Vec<usize> = (0..28).filter(|&id| probabilities[id] >= threshold).collect();
        let ruled: Vec<usize> = read_labels(probabilities)?.into_iter().map(|label| label.id()).collect();
        agreeing += usize::from(ruled.iter().any(|id| labels.contains(id)));
        counts[0].add(labels, &above);
        counts[1].add(labels, &ruled);
    }
    Ok(VerifierMetrics {
        n: lines.len(),
        macro_f1: counts[0].macro_f1(),
        macro_f1_paper_rule: counts[1].macro_f1(),
        agreement: agreeing as f64 / lines.len() as f64,
    })
}

/// For each label: rightly read, wanted, read.
#[derive(Default)]
struct Counts([[usize; 3]; 28]);

impl Counts {
    fn add(&mut self, wanted: &[usize], read: &[usize]) {
        for (id, counts) in self.0.iter_mut().enumerate() {
            let (wanted, read) = (wanted.contains(&id), read.contains(&id));
            for (count, is) in counts.iter_mut().zip([wanted && read, wanted, read]) {
                *count += usize::from(is);
            }
        }
    }

    /// A label that is neither wanted nor read counts as 0, as in scikit-learn.
    fn macro_f1(&self) -> f64 {
        let f1 = |&[right, wanted, read]: &[usize; 3]| 2.0 * right as f64 / (wanted + read).max(1) as f64;
        self.0.iter().map(f1).sum::<f64>() / self.0.len() as f64
    }
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
        let lines = vec![("a".to_owned(), vec![17]), ("b".to_owned(), vec![17, 2]), ("c".to_owned(), vec![27])];
        // At 0.2: joy; joy and not anger; anger instead of neutral. By the rule: the same, and anger in b.
        let probabilities = [with(&[(17, 0.9)]), with(&[(17, 0.6), (2, 0.15)]), with(&[(2, 0.7)])];
        let metrics = measure(&lines, &probabilities, 0.2).unwrap();
        assert!((metrics.macro_f1 - 1.0 / 28.0).abs() < 1e-9, "{metrics:?}");
        assert!((metrics.macro_f1_paper_rule - (1.0 + 2.0 / 3.0) / 28.0).abs() < 1e-9, "{metrics:?}");
        assert!((metrics.agreement - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn broken_lines_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.tsv");
        for (text, message) in [
            ("fine\t17\nno tab", "line 2: no tab"),
            ("a\t28", "\"28\" is no label id from 0 to 27"),
            ("a\t-1,3", "\"-1\" is no label id"),
            ("a\t", "\"\" is no label id"),
            ("", "holds no sentences"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_lines(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        std::fs::write(&path, "a\t1, 2\tx\nb\t3\n").unwrap();
        assert_eq!(read_lines(&path).unwrap(), [("a".to_owned(), vec![1, 2]), ("b".to_owned(), vec![3])]);
        std::fs::write(folder.path().join("candor.toml"), "[verifier]\nthreshold = 2.0").unwrap();
        assert!(threshold(folder.path()).unwrap_err().to_string().contains("from 0 to 1"));
        std::fs::write(folder.path().join("candor.toml"), "[verifier]\nthreshold = 0.25").unwrap();
        assert_eq!(threshold(folder.path()).unwrap(), 0.25);
    }
}
