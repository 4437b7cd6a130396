//! Rounds matrices with a view to their inputs: prompts of the task run through the model, and what goes into each layer
//! is added up.
//!
//! It goes in rounds over parts of the model in the order of its flow. A round's inputs are those behind the parts that
//! were rounded before, so that a layer makes up for them too. Sums take `inputs²` numbers a layer, so a round has as
//! many layers as fit.

use std::collections::HashMap;

use candor::message::say;
use candor_kernels::HostTensor;
use candor_kernels::cpu::CpuDevice;

use super::format::{Bits, Scheme};
use super::gptq::{output_error, quantise};
use super::keep::TABLE;
use super::observe::{Known, Observer};
use super::plan::{Entry, Source};
use super::samples::{Reader, Sample};
use super::stored::Integers;

/// Bytes of the sums of a round, where there is a choice.
const MOST_BYTES: usize = 1 << 30;

/// How calibration goes.
pub(super) struct Calibration<'a> {
    pub(super) samples: &'a [Sample],
    /// Whether matrices are rounded by GPTQ; else to the nearest, and only what that does to their outputs is measured.
    pub(super) gptq: bool,
    /// Rounds, if memory does not ask for more.
    pub(super) rounds: usize,
    pub(super) threads: usize,
}

/// A rounded matrix, and how much its outputs changed.
pub(super) struct Calibrated {
    pub(super) integers: Integers,
    pub(super) output_error: Option<f64>,
}

/// A matrix that may be calibrated.
struct Matrix<'a> {
    entry: &'a Entry,
    scheme: Scheme,
    tensor: HostTensor,
}

/// Rounds the matrices that the samples reach, by name. Bytes are rounded to the nearest: there is nothing to be won.
pub(super) fn calibrate(
    source: &Source,
    plan: &[Entry],
    calibration: &Calibration<'_>,
) -> anyhow::Result<HashMap<String, Calibrated>> {
    let mut matrices = Vec::new();
    for entry in plan.iter().filter(|entry| entry.name != TABLE && entry.name != "lm_head.weight") {
        if let Some(scheme) = entry.scheme() {
            matrices.push(Matrix { entry, scheme, tensor: source.checkpoint.tensor(&entry.name)? });
        }
    }
    let mut done: HashMap<String, Calibrated> = HashMap::new();
    let device = CpuDevice::new(Some(calibration.threads)).exact();
    let order = observe(source, &device, &matrices, &done, &[], &calibration.samples[..1])?.order();
    let rounds = rounds(&matrices, &order, calibration.rounds);
    for (number, round) in rounds.iter().enumerate() {
        let observer = observe(source, &device, &matrices, &done, round, calibration.samples)?;
        for &index in round {
            let Matrix { entry, scheme, .. } = &matrices[index];
            let Some(inputs) = observer.inputs(index) else { continue };
            let (values, columns) = (source.values(&entry.name)?, entry.shape[1]);
            let integers = match calibration.gptq && scheme.bits == Bits::Four {
                true => quantise(&device, &values, columns, *scheme, &inputs)?,
                false => Integers::nearest(&values, columns, *scheme, None),
            };
            let output_error = Some(output_error(&device, &integers.values(), &values, &inputs)?);
            done.insert(entry.name.clone(), Calibrated { integers, output_error });
        }
        let last = round.last().map_or("", |&index| matrices[index].entry.module());
        say(format_args!("calibration {} of {}: up to {last}", number + 1, rounds.len()))?;
    }
    Ok(done)
}

/// Runs samples through the model with what is done in it, and adds up the inputs of the `wanted` matrices.
fn observe(
    source: &Source,
    device: &CpuDevice,
    matrices: &[Matrix<'_>],
    done: &HashMap<String, Calibrated>,
    wanted: &[usize],
    samples: &[Sample],
) -> anyhow::Result<Observer> {
    let known = matrices.iter().enumerate().map(|(index, matrix)| {
        let replacement = done.get(&matrix.entry.name).map(|done| done.integers.host_tensor()).transpose()?;
        Ok(Known { tensor: matrix.tensor.clone(), replacement, wanted: wanted.contains(&index) })
    });
    let observer = Observer::new(device.clone(), known.collect::<anyhow::Result<_>>()?);
    let mut reader = Reader::open(&source.folder, observer.clone())?;
    samples.iter().try_for_each(|sample| reader.read(sample))?;
    Ok(observer)
}

/// Shares matrices, in the order of their use, out to about `count` rounds. Those of a numbered layer, or of a part
/// without numbers, stay together.
fn rounds(matrices: &[Matrix<'_>], order: &[usize], count: usize) -> Vec<Vec<usize>> {
    let mut stages: Vec<(&str, Vec<usize>)> = Vec::new();
    for &index in order {
        let stage = stage(&matrices[index].entry.name);
        match stages.iter_mut().find(|(name, _)| *name == stage) {
            Some((_, members)) => members.push(index),
            None => stages.push((stage, vec![index])),
        }
    }
    let each = stages.len().div_ceil(count.max(1));
    let bytes = |stage: &[usize]| -> usize {
        stage.iter().map(|&index| matrices[index].entry.shape[1].pow(2) * size_of::<f32>()).sum()
    };
    let mut rounds: Vec<(usize, Vec<usize>)> = Vec::new();
    for (_, stage) in stages {
        match rounds.last_mut() {
            Some((stages, round)) if *stages < each && bytes(round) + bytes(&stage) <= MOST_BYTES => {
                *stages += 1;
                round.extend(stage);
            }
            _ => rounds.push((1, stage)),
        }
    }
    rounds.into_iter().map(|(_, round)| round).collect()
}

/// A tensor's name up to the number of its layer, or to its part.
fn stage(name: &str) -> &str {
    let numbered = name.split_inclusive('.').scan(0, |end, part| {
        *end += part.len();
        Some((*end, part.trim_end_matches('.').parse::<usize>().is_ok()))
    });
    let end = numbered.filter(|(_, number)| *number).map(|(end, _)| end).next();
    end.map_or_else(|| name.rsplit_once('.').map_or(name, |(module, _)| module), |end| &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_stages() {
        for (name, expected) in [
            ("model.layers.12.mlp.down_proj.weight", "model.layers.12."),
            ("model.mm_projector.readout_body.0.weight", "model.mm_projector.readout_body.0."),
            ("classifier.weight", "classifier"),
            ("weight", "weight"),
        ] {
            assert_eq!(stage(name), expected);
        }
    }
}
