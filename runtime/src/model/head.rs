//! The output head over some of its rows.

use std::ops::Range;

use candor_kernels::{Activation, Device, DeviceError};

use super::ModelError;
use super::rows::allocate;

/// Rows between wanted ones that are computed along with them: reading so few costs no more than beginning anew.
const NEAR: usize = 256;

/// Stretches begin and end at multiples of this many rows: products treat rows in groups, and sum the last few of a weight
/// another way.
const GROUP: usize = 16;

/// The logit of a token whose row is not computed: as good as minus infinity, and still a number, so that what a broken
/// kernel makes shows.
const IMPOSSIBLE: f32 = f32::MIN;

/// Stretches of the output head's rows.
pub(super) struct Head<D: Device> {
    parts: Vec<Part<D>>,
    /// Whether the logits between the parts are impossible already.
    filled: bool,
}

struct Part<D: Device> {
    first: usize,
    rows: usize,
    weight: D::Weight,
    out: D::Buffer,
    /// What makes the logits of rows that are not wanted impossible, where there are such: zero for the others.
    barred: Option<D::Buffer>,
}

impl<D: Device> Head<D> {
    /// The rows of `tokens`, ascending and below `vocabulary`, of a head `[vocabulary, width]`.
    pub(super) fn new(device: &D, head: &D::Weight, vocabulary: usize, tokens: &[u32]) -> Result<Self, ModelError> {
        let ascending = tokens.windows(2).all(|pair| pair[0] < pair[1]);
        let last = tokens.last().is_some_and(|&last| (last as usize) < vocabulary);
        if !ascending || !last {
            let reason = format!("{} tokens that are not different ones below {vocabulary}", tokens.len());
            return Err(ModelError::input("rows of the output head", reason));
        }
        let stretches = stretches(tokens, vocabulary);
        let mut wanted = tokens.iter().map(|&id| id as usize).peekable();
        let part = |stretch: Range<usize>| {
            let weight = device.weight_rows(head, stretch.start, stretch.len())?;
            let out = allocate(device, &[stretch.len()])?;
            let (first, rows) = (stretch.start, stretch.len());
            let bars: Vec<f32> =
                stretch.map(|id| if wanted.next_if_eq(&id).is_some() { 0.0 } else { IMPOSSIBLE }).collect();
            let barred = match bars.iter().any(|&bar| bar != 0.0) {
                true => {
                    let mut barred = allocate(device, &[rows])?;
                    device.write(&bars, &mut barred, 0)?;
                    Some(barred)
                }
                false => None,
            };
            Ok::<_, ModelError>(Part { first, rows, weight, out, barred })
        };
        Ok(Head { parts: stretches.into_iter().map(part).collect::<Result<_, _>>()?, filled: false })
    }

    /// Makes the logits `[vocabulary]` of all other tokens impossible, once: they are the same buffer in every call, and nobody else
    /// writes to it between them. `scratch` has as many elements.
    pub(super) fn prepare(
        &mut self,
        device: &D,
        scratch: &mut [f32],
        logits: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        if !self.filled {
            scratch.fill(IMPOSSIBLE);
            device.write(scratch, logits, 0)?;
            self.filled = true;
        }
        Ok(())
    }

    /// A normed state `[width]` → its logits, in what was prepared.
    pub(super) fn logits(&mut self, device: &D, state: &D::Buffer, logits: &mut D::Buffer) -> Result<(), DeviceError> {
        for Part { first, rows, weight, out, barred } in &mut self.parts {
            device.linear(state, 1, weight, None, Activation::Identity, out)?;
            if let Some(barred) = barred {
                // Beside the least number there is, a logit is lost in rounding. One that is no number stays none.
                device.add(out, barred, *rows)?;
            }
            device.copy(out, 0, logits, *first, *rows)?;
        }
        Ok(())
    }
}

/// Stretches of whole groups of rows that hold all of some ascending ids below `rows`, and no gap of more than [`NEAR`].
fn stretches(ids: &[u32], rows: usize) -> Vec<Range<usize>> {
    let mut stretches: Vec<Range<usize>> = Vec::new();
    for id in ids.iter().map(|&id| id as usize) {
        let group = id / GROUP * GROUP..((id / GROUP + 1) * GROUP).min(rows);
        match stretches.last_mut() {
            Some(last) if group.start <= last.end + NEAR => last.end = group.end,
            _ => stretches.push(group),
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_rows_are_computed_together() {
        assert_eq!(stretches(&[3, 4, 5, 272, 273, 560, 1000], 1003), [0..288, 560..576, 992..1003]);
        assert!(stretches(&[], 1003).is_empty());
    }
}
