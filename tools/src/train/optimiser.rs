//! AdamW (Loshchilov and Hutter 2019) over a flat slice of parameters, fused and on all threads.

use super::parameters::Plan;
use rayon::prelude::*;

/// Elements of a slice that one task updates.
const CHUNK: usize = 1 << 16;
/// Decay of the first moment.
const BETA1: f32 = 0.9;
/// Decay of the second moment.
const BETA2: f32 = 0.999;
/// Keeps the division finite.
const EPSILON: f32 = 1e-8;

/// Moments of all parameters and the number of steps done.
pub struct AdamW {
    /// First moments.
    pub first: Vec<f32>,
    /// Second moments.
    pub second: Vec<f32>,
    /// Steps done.
    pub steps: u64,
    /// Factor of decay a tensor, in the plan's order.
    pieces: Vec<Piece>,
    decay: f32,
}

/// A run of parameters that are treated alike.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
    decay: bool,
    rate: f32,
}

impl AdamW {
    /// Moments at zero for a plan's parameters; `decay` is the decoupled weight decay.
    pub fn new(plan: &Plan, decay: f32) -> Self {
        let pieces = plan.entries().iter().flat_map(|entry| {
            let end = entry.range.end;
            entry.range.clone().step_by(CHUNK).map(move |start| Piece {
                start,
                end: end.min(start + CHUNK),
                decay: entry.treatment.decay,
                rate: entry.treatment.rate,
            })
        });
        Self { first: vec![0.0; plan.len()], second: vec![0.0; plan.len()], steps: 0, pieces: pieces.collect(), decay }
    }

    /// One update with the sum of the workers' gradients, clipped to a norm of `clip`; the gradients are left at zero.
    /// Returns the norm before clipping. A step whose gradient is not finite changes nothing.
    pub fn step(&mut self, values: &mut [f32], gradients: &mut [Vec<f32>], rate: f32, clip: f32) -> f32 {
        let Some((sum, others)) = gradients.split_first_mut() else { return 0.0 };
        let squares: Vec<f64> = sum
            .par_chunks_mut(CHUNK)
            .enumerate()
            .map(|(index, chunk)| {
                for other in others.iter() {
                    let start = index * CHUNK;
                    chunk.iter_mut().zip(&other[start..]).for_each(|(sum, g)| *sum += g);
                }
                let mut lanes = [0.0f32; 16];
                for part in chunk.chunks(16) {
                    lanes.iter_mut().zip(part).for_each(|(lane, g)| *lane += g * g);
                }
                lanes.iter().map(|lane| f64::from(*lane)).sum()
            })
            .collect();
        let norm = squares.iter().sum::<f64>().sqrt() as f32;
        if norm.is_finite() {
            self.steps += 1;
            let factor = if norm > clip { clip / norm } else { 1.0 };
            self.update(values, sum, rate, factor);
        }
        gradients.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
        norm
    }

    fn update(&mut self, values: &mut [f32], gradient: &[f32], rate: f32, factor: f32) {
        let power = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - BETA1.powi(power), 1.0 - BETA2.powi(power));
        let decay = self.decay;
        let mut tasks = Vec::with_capacity(self.pieces.len());
        let (mut values, mut first, mut second) = (values, &mut self.first[..], &mut self.second[..]);
        for piece in &self.pieces {
            let len = piece.end - piece.start;
            let (value, rest) = values.split_at_mut(len);
            values = rest;
            let (m, rest) = first.split_at_mut(len);
            first = rest;
            let (v, rest) = second.split_at_mut(len);
            second = rest;
            tasks.push((piece, value, m, v));
        }
        tasks.into_par_iter().for_each(|(piece, values, first, second)| {
            if piece.rate == 0.0 {
                return; // stays as it is
            }
            let rate = rate * piece.rate;
            let shrink = if piece.decay { 1.0 - rate * decay } else { 1.0 };
            let gradient = &gradient[piece.start..piece.end];
            for (((value, m), v), g) in values.iter_mut().zip(first).zip(second).zip(gradient) {
                let g = g * factor;
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                *value = *value * shrink - rate * (*m / correction1) / ((*v / correction2).sqrt() + EPSILON);
            }
        });
    }
}
