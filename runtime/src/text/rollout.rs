//! Rollouts for reward fine-tuning: each prompt is read once and continued several times, all continuations side by
//! side, drawn from the model as it is (without the output grammar, whose format is to be learnt), with the
//! log-probability of every token.

use candor_kernels::Device;
use candor_kernels::choice::exponential;

use super::grammar::Mask;
use super::sampling::{Sampler, Sampling, SamplingError};
use crate::model::{Batch, DecodeError, LanguageModel, ModelError, Session};

/// Why there are no rollouts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RolloutError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No token could be drawn.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// One continuation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollout {
    /// Its tokens, the end of the turn included where it came to it.
    pub tokens: Vec<u32>,
    /// The log-probability of each as the drawing model has it, at the temperature it was drawn with.
    pub log_probs: Vec<f32>,
    /// Whether it came to the end of its turn within the budget.
    pub finished: bool,
}

/// What a rollout depends on beside the model.
#[derive(Clone, Copy, Debug)]
pub struct RolloutSettings {
    /// Continuations of each prompt.
    pub group: usize,
    /// Most tokens of a continuation.
    pub max_new_tokens: usize,
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// The token that ends the turn.
    pub end_of_turn: u32,
}

/// Continues `prompts` prompts, `group` times each: `read(session, prompt)` starts the session on a prompt, `seed`
/// gives each continuation its random numbers. Needs `prompts · group` slots. Returns `[prompts][group]`.
pub fn roll_out<D: Device, E: From<RolloutError>>(
    settings: RolloutSettings,
    session: &mut Session<D>,
    batch: &mut Batch<D>,
    prompts: usize,
    mut read: impl FnMut(&mut Session<D>, usize) -> Result<(), E>,
    seed: impl Fn(usize, usize) -> u64,
) -> Result<Vec<Vec<Rollout>>, E> {
    let RolloutSettings { group, max_new_tokens, temperature, end_of_turn } = settings;
    let model = |error: ModelError| E::from(RolloutError::Model(error));
    let sampling = |error: SamplingError| E::from(RolloutError::Sampling(error));
    if temperature <= 0.0 {
        let range = "a number above 0: a group of equal continuations teaches nothing";
        return Err(sampling(SamplingError::Setting { setting: "temperature", value: temperature, range }));
    }
    let vocabulary = batch.vocabulary();
    let mask = Mask::all(vocabulary);
    let mut drawing = Vec::with_capacity(prompts * group);
    for prompt in 0..prompts {
        read(session, prompt)?;
        let needed = session.position() + max_new_tokens;
        if needed > batch.capacity() + 1 {
            let capacity = batch.capacity();
            return Err(model(DecodeError::Full { capacity, needed }.into()));
        }
        for continuation in 0..group {
            batch.copy_from(session, drawing.len()).map_err(model)?;
            let settings = Sampling { temperature, top_p: 1.0, seed: seed(prompt, continuation) };
            let mut one = Drawing { sampler: Sampler::new(settings).map_err(sampling)?, rollout: Rollout::default() };
            let logits = session.logits().map_err(|error| model(error.into()))?;
            one.draw(logits, &mask, temperature, end_of_turn).map_err(sampling)?;
            drawing.push(one);
        }
    }
    let mut live: Vec<(usize, u32)> = Vec::with_capacity(drawing.len());
    loop {
        live.clear();
        for (slot, one) in drawing.iter().enumerate() {
            if let Some(&last) = one.rollout.tokens.last()
                && !one.rollout.finished
                && one.rollout.tokens.len() < max_new_tokens
            {
                live.push((slot, last));
            }
        }
        if live.is_empty() {
            break;
        }
        let logits = batch.append(&live).map_err(model)?;
        for (&(slot, _), logits) in live.iter().zip(logits.chunks_exact(vocabulary)) {
            drawing[slot].draw(logits, &mask, temperature, end_of_turn).map_err(sampling)?;
        }
    }
    let mut rollouts = drawing.into_iter().map(|one| one.rollout);
    Ok((0..prompts).map(|_| rollouts.by_ref().take(group).collect()).collect())
}

/// A continuation that is being drawn.
struct Drawing {
    sampler: Sampler,
    rollout: Rollout,
}

impl Drawing {
    fn draw(&mut self, logits: &[f32], mask: &Mask, temperature: f32, end: u32) -> Result<(), SamplingError> {
        let token = self.sampler.choose(logits, mask, &[])?;
        self.rollout.tokens.push(token);
        self.rollout.log_probs.push(log_prob(logits, token, temperature));
        self.rollout.finished = token == end;
        Ok(())
    }
}

/// The log-probability of a token: logit / temperature less the logarithm of the sum of all exponentials.
fn log_prob(logits: &[f32], token: u32, temperature: f32) -> f32 {
    let scaled = |logit: f32| f64::from(logit) / f64::from(temperature);
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| exponential(scaled(logit) - scaled(greatest))).sum();
    let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (scaled(own) - scaled(greatest) - total.ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probs_are_those_of_the_softmax() {
        let logits = [0.5f32.ln() + 3.0, 0.3f32.ln() + 3.0, 0.2f32.ln() + 3.0];
        for (token, expected) in [(0, 0.5f32), (1, 0.3), (2, 0.2)] {
            assert!((log_prob(&logits, token, 1.0) - expected.ln()).abs() < 1e-6);
        }
        let total = 0.25f32 + 0.09 + 0.04;
        assert!((log_prob(&logits, 1, 0.5) - (0.09 / total).ln()).abs() < 1e-6);
    }
}
