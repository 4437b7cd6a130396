//! What was done to a model and what came of it, as a table and as JSON.

use std::io;
use std::path::Path;

use candor::manifest::Manifest;
use candor::message::say;
use serde::Serialize;

use super::measure::Logits;
use super::plan::Entry;
use super::stored::{Integers, relative_error};
use crate::eval::flips::Flips;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    model: String,
    output: String,
    bytes_before: u64,
    bytes: u64,
    pub(super) layers: Vec<Layer>,
    /// With activations as in use.
    pub(super) logits: Option<Logits>,
    /// With activations in f32: what is due to the weights alone.
    pub(super) logits_exact: Option<Logits>,
    pub(super) flips: Option<Flips>,
}

/// A matrix that is stored as whole numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Layer {
    /// The module.
    pub(super) name: String,
    format: String,
    /// Root mean square of the weights' change, relative to the weights.
    weight_error: f64,
    /// The same of the layer's outputs, where inputs were seen.
    output_error: Option<f64>,
    /// Divergence of the next token where this matrix alone is exchanged.
    pub(super) kl: Option<f64>,
}

impl Layer {
    pub(super) fn new(entry: &Entry, integers: &Integers, values: &[f32], output_error: Option<f64>) -> Layer {
        Layer {
            name: entry.module().to_owned(),
            format: integers.scheme.to_string(),
            weight_error: relative_error(&integers.values(), values),
            output_error,
            kl: None,
        }
    }
}

impl Report {
    pub(super) fn new(model: &Path, output: &Path, bytes_before: u64, bytes: u64, layers: Vec<Layer>) -> Report {
        let name = |path: &Path| path.display().to_string();
        Report {
            model: name(model),
            output: name(output),
            bytes_before,
            bytes,
            layers,
            logits: None,
            logits_exact: None,
            flips: None,
        }
    }

    /// What became larger or smaller.
    pub(super) fn sizes(&self) -> String {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let (after, before) = (megabytes(self.bytes), megabytes(self.bytes_before));
        format!("{}: {after:.1} MB of weights, {before:.1} MB before", self.output)
    }

    pub(super) fn print(&self, manifest: &Manifest) -> io::Result<()> {
        say(format_args!("\n{:>9} {:>9} {:>9}  error of the weights, of the outputs; KL of it alone", "", "", ""))?;
        for layer in &self.layers {
            let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.6}"));
            let (weights, outputs) = (shown(Some(layer.weight_error)), shown(layer.output_error));
            say(format_args!("{weights:>9} {outputs:>9} {:>9}  {}, {}", shown(layer.kl), layer.name, layer.format))?;
        }
        let line = |name: &str, value: String| say(format_args!("{name:48} {value}"));
        for (what, logits) in [("activations in f32", &self.logits_exact), ("as in use", &self.logits)] {
            let Some(logits) = logits else { continue };
            say(format_args!("\nlogits of {} tokens, {what}", logits.tokens))?;
            line("mean KL from the model as it was, nats", format!("{:.6}", logits.kl))?;
            line("perplexity, before", format!("{:.4}, {:.4}", logits.perplexity, logits.perplexity_before))?;
            line("tokens of which another is the likeliest", format!("{:.2} %", 100.0 * logits.other_choice))?;
        }
        if let Some(flips) = &self.flips {
            say(format_args!("\n{} entries, as in use, against the model as it was, computed exactly", flips.n))?;
            for (name, count) in [
                ("labels shown that differ", flips.shown(manifest.model.answer)),
                ("fast answers that differ", flips.fast),
                ("answers after the rationale that differ", flips.after),
                ("verdicts that differ", flips.verdict),
                ("rationales that differ", flips.rationale),
            ] {
                line(name, format!("{count}  {:.2} %", 100.0 * flips.share(count)))?;
            }
        }
        Ok(())
    }
}
