//! How completions are paid: options of `candor-tools reward`, `reward-server` and `train grpo`.

use anyhow::ensure;

use super::Weights;

/// Weights and guard.
#[derive(clap::Args, Clone, Debug)]
pub struct RewardSettings {
    /// Weight of the format reward in the total.
    #[arg(long, default_value_t = 1.0)]
    pub format_weight: f32,
    /// Weight of the accuracy reward in the total.
    #[arg(long, default_value_t = 1.0)]
    pub accuracy_weight: f32,
    /// Weight of the explanation reward in the total.
    #[arg(long, default_value_t = 1.0)]
    pub explanation_weight: f32,
    /// Pay the explanation reward only to rationales that are more than a conclusion: at least two sentences, one of
    /// which names no emotion unless the label is neutral.
    #[arg(long)]
    pub guard: bool,
}

impl RewardSettings {
    /// Refuses weights that are not finite, or negative.
    pub fn check(&self) -> anyhow::Result<()> {
        for (name, value) in [
            ("format-weight", self.format_weight),
            ("accuracy-weight", self.accuracy_weight),
            ("explanation-weight", self.explanation_weight),
        ] {
            ensure!(value.is_finite() && value >= 0.0, "--{name} must be 0 or above, not {value}");
        }
        Ok(())
    }

    /// The weights. Nothing is paid for groundedness: it takes cues, which texts come without.
    pub fn weights(&self) -> Weights {
        Weights {
            format: self.format_weight,
            accuracy: self.accuracy_weight,
            explanation: self.explanation_weight,
            groundedness: 0.0,
        }
    }
}
