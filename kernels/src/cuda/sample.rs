//! Choosing a token on the GPU: what is allowed goes up where it has changed, and one id comes back.

use cudarc::driver::DeviceRepr;
use std::sync::PoisonError;

use super::arena::Memory;
use super::driver::failed;
use super::launch::{Argument, Grid, launch};
use super::layers::grown;
use super::{CudaBuffer, CudaDevice, address, replay};
use crate::check;
use crate::choice::{Allowed, Choice, ChoiceError};
use crate::device::Result;

const OP: &str = "choose";
/// Threads of a block of cuda/sample.cu, and the candidates that it takes.
const THREADS: u32 = 1024;
const SHARE: usize = 4096;
/// Words of the kernels' `State`, and where in it the outcome begins.
const STATE: usize = 12;
const OUTCOME: usize = 8;
/// The outcomes.
const TOKEN: u32 = 0;
const NOT_FINITE: u32 = 1;

/// What choices need on the GPU. It grows to the most that was ever needed.
#[derive(Debug, Default)]
pub(super) struct Choosing {
    /// The candidates of the last choice, which are still there in most of the next.
    words: Vec<u32>,
    next: Vec<u32>,
    uploaded: Option<Memory<u32>>,
    /// Zeros but for the outcome.
    state: Option<Memory<u32>>,
    list: Option<Memory<u64>>,
}

arguments! {
    /// `Candidates` of cuda/sample.cu.
    Candidates { words: u64, count: i32, listed: i32 }
    /// `Draw` of cuda/sample.cu.
    Draw { point: u64, share: u64, inverse: f32, inverse_rest: f32, reach: f32, scale: f32, id_bits: i32, end: i32 }
}

impl Draw {
    /// `vocabulary` is at least 1.
    fn new(temperature: f32, top_p: f32, point: f64, vocabulary: usize) -> Draw {
        let whole = 2f64.powi(64);
        let exact = 1.0 / f64::from(temperature);
        let inverse = exact as f32;
        let rest = (exact - f64::from(inverse)) as f32;
        // Candidates below this share of the greatest's weight add up to less than 1 - top_p of all; a hundredth to spare.
        let reach = (vocabulary as f64 / (1.0 - f64::from(top_p))).ln() + 0.01;
        let bits = |count: usize| (usize::BITS - count.leading_zeros()) as i32;
        Draw {
            point: (point * whole) as u64,
            share: ((f64::from(top_p) * whole) as u64).max(1),
            inverse,
            inverse_rest: if rest.is_finite() { rest } else { 0.0 },
            reach: (reach * f64::from(temperature)) as f32,
            // As large as it may be for sums of the whole vocabulary to stay below 2⁶³.
            scale: 2f32.powi(62 - bits(vocabulary)),
            id_bits: bits(vocabulary - 1).max(1),
            end: 0,
        }
    }
}

/// The candidates as the kernels read them: ids or bits without what is forbidden. Returns whether they are ids.
fn words(allowed: Allowed<'_>, forbidden: &[u32], words: &mut Vec<u32>) -> bool {
    words.clear();
    match allowed {
        Allowed::Ids(ids) => {
            words.extend(ids.iter().filter(|id| !forbidden.contains(id)));
            true
        }
        Allowed::Bits(bits) => {
            words.extend(bits.iter().flat_map(|&word| [word as u32, (word >> 32) as u32]));
            for &id in forbidden {
                if let Some(word) = words.get_mut(id as usize / 32) {
                    *word &= !(1 << (id % 32));
                }
            }
            false
        }
    }
}

/// Chooses by logits that there are `vocabulary` of.
pub(super) fn choose(
    device: &CudaDevice,
    logits: &CudaBuffer,
    vocabulary: usize,
    allowed: Allowed<'_>,
    forbidden: &[u32],
    choice: Choice,
) -> Result<u32> {
    replay::refuse(&device.inner.gpu, OP)?;
    choice.check()?;
    allowed.check(vocabulary)?;
    check::at_least(OP, "logits", logits.len, &[vocabulary])?;
    let total = device.small(OP, "logits", vocabulary)?;
    if vocabulary == 0 {
        return Err(ChoiceError::NothingAllowed.into());
    }
    let mut choosing = device.inner.choosing.lock().unwrap_or_else(PoisonError::into_inner);
    let Choosing { words: held, next, uploaded, state, list } = &mut *choosing;
    let listed = words(allowed, forbidden, next);
    // Few ids are not more words than bits are.
    upload(device, uploaded, held, next, vocabulary.div_ceil(32))?;
    // Bits may end before the vocabulary does.
    let count = if listed { held.len() } else { vocabulary.min(32 * held.len()) };
    let candidates = Candidates {
        words: uploaded.as_ref().map_or(0, |words| address(words, 0)),
        count: device.small(OP, "tokens", count)?,
        listed: i32::from(listed),
    };
    let state = grown(device, state, Some(STATE))?;
    let (logits, at) = (address(&logits.data, 0), address(state, 0));
    let grid = |candidates: usize| Grid::blocks([candidates.div_ceil(SHARE).max(1), 1, 1], THREADS);
    run!(device, OP, choose_most, grid(vocabulary), logits, total, candidates, at)?;
    if let Choice::Drawn { temperature, top_p, point } = choice {
        let list = address(grown(device, list, Some(vocabulary))?, 0);
        let draw = Draw::new(temperature, top_p, point, vocabulary);
        if top_p < 1.0 {
            run!(device, OP, choose_nucleus, grid(count), logits, candidates, draw, at, list)?;
        } else {
            run!(device, OP, choose_any, grid(count), logits, candidates, draw, at, list)?;
        }
    }
    let mut outcome = [0; 3];
    state.read(OUTCOME, &mut outcome).map_err(failed(OP, 0))?;
    match outcome {
        [TOKEN, id, _] => Ok(id),
        [NOT_FINITE, id, logit] => Err(ChoiceError::NotFinite { id: id as usize, value: f32::from_bits(logit) }.into()),
        _ => Err(ChoiceError::NothingAllowed.into()),
    }
}

/// Makes `next` what is held and uploaded, to where there is room for `room` words at least.
fn upload(
    device: &CudaDevice,
    uploaded: &mut Option<Memory<u32>>,
    held: &mut Vec<u32>,
    next: &mut Vec<u32>,
    room: usize,
) -> Result<()> {
    if held == next && uploaded.is_some() {
        return Ok(());
    }
    // Nothing is held should this fail.
    held.clear();
    grown(device, uploaded, Some(next.len().max(room)))?;
    if let Some(to) = uploaded.as_mut().filter(|_| !next.is_empty()) {
        to.write(0, next).map_err(failed(OP, 0))?;
    }
    std::mem::swap(held, next);
    Ok(())
}
