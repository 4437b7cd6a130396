//! What storing weights in another way does to a model: to the logits before each token of a completion, and to what the
//! model says of labelled clips or photographs.

use std::path::Path;

use candor::device::Choice;
use candor::manifest::Manifest;
use candor::text::HeadRows;
use candor::watch::Policy;
use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Device, HostTensor};
use serde::Serialize;

use super::observe::{Known, Observer};
use super::samples::{Data, Reader, Sample};
use crate::eval::flips::Flips;
use crate::eval::{self, EvalArgs};
use crate::workers;

/// A comparison of logits over the tokens of completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Logits {
    /// Tokens.
    pub(super) tokens: usize,
    /// Mean Kullback-Leibler divergence of the second model's next token from the first's, in nats.
    pub(super) kl: f64,
    /// Perplexity of the completions under the first model.
    pub(super) perplexity_before: f64,
    /// And under the second.
    pub(super) perplexity: f64,
    /// Share of tokens where another one is the likeliest.
    pub(super) other_choice: f64,
}

/// Sums over tokens.
#[derive(Clone, Copy, Default)]
struct Sums {
    tokens: usize,
    kl: f64,
    surprise: [f64; 2],
    other: usize,
}

/// Two ways to open the same model, one thread each.
pub(super) trait Pair: Sync {
    /// The second model's device.
    type Device: Device;
    /// Opens the second model.
    fn second(&self) -> anyhow::Result<Reader<Self::Device>>;
}

/// A folder on a device.
pub(super) struct Folder<'a, D: Device> {
    pub(super) folder: &'a Path,
    pub(super) device: D,
}

impl<D: Device> Pair for Folder<'_, D> {
    type Device = D;
    fn second(&self) -> anyhow::Result<Reader<D>> {
        Reader::open(self.folder, self.device.clone())
    }
}

/// The first model with another matrix in the place of one.
pub(super) struct Exchanged<'a> {
    pub(super) folder: &'a Path,
    pub(super) tensor: HostTensor,
    pub(super) replacement: HostTensor,
}

impl Pair for Exchanged<'_> {
    type Device = Observer;
    fn second(&self) -> anyhow::Result<Reader<Observer>> {
        let replacement = Some(self.replacement.clone());
        let known = Known { tensor: self.tensor.clone(), replacement, wanted: false };
        Reader::open(self.folder, Observer::new(CpuDevice::new(Some(1)).exact(), vec![known]))
    }
}

/// Compares the logits of a model on a device that computes exactly with those of another one.
pub(super) fn logits<D: Device, P: Pair>(
    first: &Path,
    second: &P,
    samples: &[Sample],
    threads: usize,
    what: &str,
    exact: &D,
) -> anyhow::Result<Logits> {
    let open = || Ok((Reader::open(first, exact.clone())?, second.second()?));
    let work = |(first, second): &mut (Reader<D>, Reader<P::Device>), place: usize| {
        let sample = &samples[place];
        let mut expected: Vec<Vec<f32>> = Vec::with_capacity(sample.completion.len());
        first.logits(sample, |logits, _| expected.push(logits.to_vec()))?;
        let mut sums = Sums::default();
        let mut expected = expected.iter();
        second.logits(sample, |logits, token| {
            if let Some(expected) = expected.next() {
                sums.add(expected, logits, token as usize);
            }
        })?;
        Ok(sums)
    };
    let each = workers::run(samples.len(), threads, what, open, work)?;
    let all = each.into_iter().fold(Sums::default(), |a, b| Sums {
        tokens: a.tokens + b.tokens,
        kl: a.kl + b.kl,
        surprise: [a.surprise[0] + b.surprise[0], a.surprise[1] + b.surprise[1]],
        other: a.other + b.other,
    });
    let mean = |sum: f64| sum / all.tokens.max(1) as f64;
    Ok(Logits {
        tokens: all.tokens,
        kl: mean(all.kl),
        perplexity_before: mean(all.surprise[0]).exp(),
        perplexity: mean(all.surprise[1]).exp(),
        other_choice: mean(all.other as f64),
    })
}

impl Sums {
    fn add(&mut self, first: &[f32], second: &[f32], token: usize) {
        let (a, b) = (log_probabilities(first), log_probabilities(second));
        self.tokens += 1;
        self.kl +=
            a.iter().zip(&b).map(|(a, b)| if *a > f64::NEG_INFINITY { a.exp() * (a - b) } else { 0.0 }).sum::<f64>();
        for (sum, logs) in self.surprise.iter_mut().zip([&a, &b]) {
            *sum -= logs.get(token).copied().unwrap_or(f64::NEG_INFINITY);
        }
        self.other += usize::from(best(first) != best(second));
    }
}

fn best(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, &logit| most.max(logit.into()));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
    let whole = most + sum.ln();
    logits.iter().map(|&logit| f64::from(logit) - whole).collect()
}

/// Evaluates both, the first exactly and the second as in use, and counts where they differ.
pub(super) fn flips(
    first: &Path,
    second: &Path,
    data: &Data,
    limit: Option<usize>,
    threads: usize,
    device: Choice,
) -> anyhow::Result<Flips> {
    let manifest = Manifest::open(first)?;
    let records = |model: &Path, exact: bool| {
        let (part, list, faces) = match &data.part {
            Some(part) => (part.clone(), None, Some(data.path.clone())),
            None => (String::new(), Some(data.path.clone()), None),
        };
        eval::records(&EvalArgs {
            model: Some(model.to_owned()),
            part,
            data: list,
            faces,
            adapter: None,
            verifier: manifest.verifier_folder(),
            media_root: None,
            features: None,
            skip_bad: false,
            policy: Policy::Annotate,
            head_rows: HeadRows::All,
            seed: 0,
            temperature: 0.0,
            top_p: 0.9,
            limit,
            json: false,
            records: None,
            html: None,
            pictures: 0,
            threads,
            device,
            exact,
            compare: None,
        })
    };
    let (before, after) = (records(first, true)?, records(second, false)?);
    Ok(Flips::between(&before, &after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_and_surprise_follow_their_definitions() {
        let mut sums = Sums::default();
        sums.add(&[0.0, 0.0], &[0.0, 3f32.ln()], 0);
        // ½ ln(½ / ¼) + ½ ln(½ / ¾)
        assert!((sums.kl - 0.5 * (4.0f64 / 3.0).ln()).abs() < 1e-6);
        assert!((sums.surprise[0] - 2f64.ln()).abs() < 1e-6 && (sums.surprise[1] - 4f64.ln()).abs() < 1e-6);
        sums.add(&[1.0, 2.0], &[1.0, 2.0], 1);
        assert_eq!((sums.tokens, sums.other), (2, 0));
        sums.add(&[f32::NEG_INFINITY, 2.0], &[3.0, 2.0], 1);
        assert!(sums.kl.is_finite() && sums.other == 1);
    }
}
