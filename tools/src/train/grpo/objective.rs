//! The arithmetic of group relative policy optimisation (GRPO, Shao et al. 2024) and of what was found to matter since:
//! from rewards to advantages, from log-probabilities to losses and their gradients. No model in here.

use clap::ValueEnum;

/// Keeps the division finite where a group's rewards are nearly equal.
const EPSILON: f32 = 1e-4;

/// What advantages are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scale {
    /// The standard deviation of the group's rewards (GRPO).
    Group,
    /// The standard deviation of all the step's rewards.
    Batch,
    /// Nothing (Dr. GRPO, Liu et al. 2025): a group of nearly equal rewards counts for little.
    None,
}

/// How the losses of tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Normalisation {
    /// Mean over each completion's tokens, then over completions (GRPO).
    Completion,
    /// Mean over all the step's tokens (DAPO, Yu et al. 2025): long completions count for more.
    Token,
    /// Sum over tokens by completions and the most tokens a completion may have (Dr. GRPO): length decides nothing.
    Constant,
}

/// The switches of the objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// How far a ratio may fall below 1 before it is clipped.
    pub clip_low: f32,
    /// How far it may rise above 1; more than `clip_low` is DAPO's asymmetric clipping.
    pub clip_high: f32,
    /// Coefficient of the divergence from the reference model; 0 does without it.
    pub beta: f32,
    /// What advantages are divided by.
    pub scale: Scale,
    /// How the losses of tokens become one.
    pub normalisation: Normalisation,
    /// Leave out groups whose rewards are all equal.
    pub drop_flat: bool,
    /// Leave out completions that ran into the budget (DAPO's overlong filtering).
    pub drop_truncated: bool,
    /// Largest weight that corrects for rollouts drawn by other kernels or rounded weights (truncated importance
    /// sampling, Yao et al. 2025); 0 corrects nothing.
    pub importance_cap: f32,
    /// Most tokens a completion may have.
    pub max_new_tokens: usize,
}

/// The advantage of each completion, `[groups][completions]`, from their rewards.
pub fn advantages(rewards: &[Vec<f32>], scale: Scale) -> Vec<Vec<f32>> {
    let all: Vec<f32> = rewards.iter().flatten().copied().collect();
    let batch = deviation(&all);
    let group = |rewards: &Vec<f32>| {
        let mean = mean(rewards);
        let divisor = match scale {
            Scale::Group => deviation(rewards) + EPSILON,
            Scale::Batch => batch + EPSILON,
            Scale::None => 1.0,
        };
        rewards.iter().map(|reward| (reward - mean) / divisor).collect()
    };
    rewards.iter().map(group).collect()
}

/// Whether all rewards of a group are equal, so that it teaches nothing.
pub fn is_flat(rewards: &[f32]) -> bool {
    rewards.iter().all(|reward| *reward == rewards[0])
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
}

/// The standard deviation with Bessel's correction; 0 of a single value.
fn deviation(values: &[f32]) -> f32 {
    let mean = mean(values);
    let squares: f32 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    if values.len() > 1 { (squares / (values.len() - 1) as f32).sqrt() } else { 0.0 }
}

/// What one token's loss is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    /// Log-probability now.
    pub log_prob: f32,
    /// Log-probability in the trainer when the rollout was drawn.
    pub old: f32,
    /// Log-probability in the reference model, where there is a divergence to compute.
    pub reference: Option<f32>,
    /// Log-probability as the rollout's model had it.
    pub drawn: f32,
}

/// A token's loss, its slope by the log-probability, and what there is to log.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLoss {
    /// The loss, before normalisation.
    pub loss: f32,
    /// Its derivative by the log-probability now.
    pub slope: f32,
    /// The estimate of the divergence from the reference.
    pub divergence: f32,
    /// Whether the clipped ratio was the one that counted.
    pub clipped: bool,
}

impl Objective {
    /// `-min(ratio · A, clip(ratio) · A) · importance + β · KL` with `ratio = exp(log_prob - old)` and
    /// `KL = exp(ref - log_prob) - (ref - log_prob) - 1`.
    pub fn token(&self, token: Token, advantage: f32) -> TokenLoss {
        let ratio = (token.log_prob - token.old).exp();
        let clipped_ratio = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high);
        let importance = self.importance(token);
        let (plain, bounded) = (ratio * advantage, clipped_ratio * advantage);
        let clipped = bounded < plain;
        let mut loss = -plain.min(bounded) * importance;
        let mut slope = if clipped { 0.0 } else { -plain * importance };
        let mut divergence = 0.0;
        if let Some(reference) = token.reference {
            let difference = reference - token.log_prob;
            divergence = difference.exp() - difference - 1.0;
            loss += self.beta * divergence;
            slope += self.beta * (1.0 - difference.exp());
        }
        TokenLoss { loss, slope, divergence, clipped }
    }

    /// The weight that corrects for the rollout's own kernels.
    pub fn importance(&self, token: Token) -> f32 {
        if self.importance_cap > 0.0 { (token.old - token.drawn).exp().min(self.importance_cap) } else { 1.0 }
    }

    /// The factor of a token's loss in a completion of `length` tokens, where the step has `completions` of `tokens`
    /// tokens together; left-out ones are not counted.
    pub fn factor(&self, length: usize, completions: usize, tokens: usize) -> f32 {
        let whole = match self.normalisation {
            Normalisation::Completion => length.max(1) * completions,
            Normalisation::Token => tokens,
            Normalisation::Constant => completions * self.max_new_tokens,
        };
        1.0 / whole.max(1) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Objective = Objective {
        clip_low: 0.2,
        clip_high: 0.2,
        beta: 0.0,
        scale: Scale::Group,
        normalisation: Normalisation::Completion,
        drop_flat: false,
        drop_truncated: false,
        importance_cap: 0.0,
        max_new_tokens: 10,
    };

    fn close(a: f32, b: f32) {
        assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{a} against {b}");
    }

    #[test]
    fn advantages_of_a_group() {
        // Rewards 0, 1, 2, 3: mean 1.5, squares 2.25 + 0.25 + 0.25 + 2.25 = 5, by 3, root 1.290 994.
        let rewards = vec![vec![0.0, 1.0, 2.0, 3.0], vec![2.0; 4]];
        let grpo = advantages(&rewards, Scale::Group);
        for (a, expected) in grpo[0].iter().zip([-1.161_805, -0.387_268, 0.387_268, 1.161_805]) {
            close(*a, expected);
        }
        assert_eq!(grpo[1], [0.0; 4]);
        assert_eq!(advantages(&rewards, Scale::None)[0], [-1.5, -0.5, 0.5, 1.5]);
        // All eight: mean 1.75, squares 3.0625 + 0.5625 + 0.0625 + 1.5625 + 4 · 0.0625 = 5.5, by 7, root 0.886 405.
        close(advantages(&rewards, Scale::Batch)[0][3], 1.5 / (0.886_405_3 + 1e-4));
        assert!(is_flat(&rewards[1]) && !is_flat(&rewards[0]));
        assert_eq!(advantages(&[vec![5.0]], Scale::Group), [vec![0.0]]);
    }

    fn token(log_prob: f32, old: f32) -> Token {
        Token { log_prob, old, reference: None, drawn: old }
    }

    #[test]
    fn clipping_is_asymmetric() {
        let objective = Objective { clip_low: 0.2, clip_high: 0.28, ..PLAIN };
        // Ratio 1: the loss is -A, and so is its slope.
        assert_eq!(
            objective.token(token(-1.0, -1.0), 2.0),
            TokenLoss { loss: -2.0, slope: -2.0, ..Default::default() }
        );
        // Ratio 1.25 is within 1.28.
        let inside = objective.token(token(1.25f32.ln() - 3.0, -3.0), 2.0);
        close(inside.loss, -2.5);
        close(inside.slope, -2.5);
        // Ratio 1.5 with a good completion is clipped at 1.28 and pushes no further; a bad one is pushed back.
        let above = objective.token(token(1.5f32.ln(), 0.0), 2.0);
        close(above.loss, -2.56);
        assert!(above.clipped && above.slope == 0.0);
        let pushed_back = objective.token(token(1.5f32.ln(), 0.0), -2.0);
        close(pushed_back.loss, 3.0);
        close(pushed_back.slope, 3.0);
        // Ratio 0.5 with a bad completion is clipped at 0.8.
        let below = objective.token(token(0.5f32.ln(), 0.0), -2.0);
        close(below.loss, 1.6);
        assert!(below.clipped && below.slope == 0.0);
    }

    #[test]
    fn divergence_from_the_reference() {
        let objective = Objective { beta: 0.04, ..PLAIN };
        // ref - log_prob = ln 2: KL = 2 - ln 2 - 1 = 0.306 853, slope 0.04 · (1 - 2).
        let token = Token { reference: Some(2f32.ln() - 1.0), ..token(-1.0, -1.0) };
        let out = objective.token(token, 0.5);
        close(out.divergence, 0.306_853);
        close(out.loss, -0.5 + 0.04 * 0.306_853);
        close(out.slope, -0.5 - 0.04);
        let same = objective.token(Token { reference: Some(-1.0), ..token }, 0.5);
        assert_eq!((same.divergence, same.loss, same.slope), (0.0, -0.5, -0.5));
    }

    #[test]
    fn importance_is_truncated() {
        let objective = Objective { importance_cap: 2.0, beta: 0.1, ..PLAIN };
        let drawn = |drawn: f32| Token { drawn, reference: Some(-1.0), ..token(-1.0, -1.0) };
        close(objective.token(drawn(-1.0 - 1.5f32.ln()), 1.0).loss, -1.5);
        close(objective.token(drawn(-1.0 - 1.5f32.ln()), 1.0).slope, -1.5);
        close(objective.token(drawn(-9.0), 1.0).loss, -2.0);
        close(objective.token(drawn(-1.0 - 0.5f32.ln()), 1.0).loss, -0.5);
        close(Objective { importance_cap: 0.0, ..objective }.token(drawn(-9.0), 1.0).loss, -1.0);
    }

    #[test]
    fn losses_are_normalised_three_ways() {
        // Two completions of 2 and 6 tokens.
        close(PLAIN.factor(2, 2, 8), 1.0 / 4.0);
        close(PLAIN.factor(6, 2, 8), 1.0 / 12.0);
        let by = |normalisation| Objective { normalisation, ..PLAIN };
        close(by(Normalisation::Token).factor(2, 2, 8), 1.0 / 8.0);
        close(by(Normalisation::Constant).factor(6, 2, 8), 1.0 / 20.0);
    }

    #[test]
    fn slopes_are_the_derivatives_of_losses() {
        let objective = Objective { clip_low: 0.2, clip_high: 0.28, beta: 0.04, importance_cap: 2.0, ..PLAIN };
        for old in [-1.0, -1.1, -1.5, -0.9, -0.5] {
            for advantage in [-1.3, 0.0, 0.7] {
                let at = |log_prob: f32| {
                    let token = Token { log_prob, old, reference: Some(-1.3), drawn: old - 0.1 };
                    objective.token(token, advantage)
                };
                let (above, below) = (at(-1.0 + 1e-3), at(-1.0 - 1e-3));
                let slope = (above.loss - below.loss) / 2e-3;
                assert!((at(-1.0).slope - slope).abs() < 2e-3, "{old} {advantage}");
            }
        }
    }
}
