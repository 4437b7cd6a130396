//! The learning rate over a training's steps: a linear warm-up, then a cosine or a straight line down to zero, or no
//! way down.

/// Shape of the way down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Decay {
    /// None.
    Constant,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
}

/// A learning rate for every step.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Rate at the end of the warm-up.
    pub peak: f32,
    /// Steps of the warm-up.
    pub warm_up: u64,
    /// Steps in all.
    pub total: u64,
    /// Shape of the way down.
    pub decay: Decay,
}

impl Schedule {
    /// Rate of a step, counted from 0; zero from `total` on where there is a way down.
    pub fn rate(&self, step: u64) -> f32 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f32 / self.warm_up as f32;
        }
        let length = self.total.saturating_sub(self.warm_up).max(1);
        let progress = ((step - self.warm_up) as f32 / length as f32).min(1.0);
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => self.peak * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos()),
            Decay::Linear => self.peak * (1.0 - progress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_and_ends_at_zero() {
        for decay in [Decay::Cosine, Decay::Linear] {
            let schedule = Schedule { peak: 1e-3, warm_up: 10, total: 110, decay };
            assert!((schedule.rate(0) - 1e-4).abs() < 1e-9);
            assert!((schedule.rate(9) - 1e-3).abs() < 1e-9);
            assert!((schedule.rate(60) - 5e-4).abs() < 1e-6, "half way down");
            assert!(schedule.rate(110).abs() < 1e-9);
            assert!(schedule.rate(5_000).abs() < 1e-9);
            assert!((10..110).all(|step| schedule.rate(step) >= schedule.rate(step + 1)));
        }
    }
}
