//! Learning rate by step: a linear rise, then constant, linear or cosine down to a fraction of the peak.

/// Shape after the rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Constant,
    Linear,
    /// Half a cosine (Loshchilov & Hutter 2017).
    Cosine,
}

/// A schedule over a run of known length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    pub peak: f64,
    pub warmup_steps: u64,
    pub total_steps: u64,
    /// Rate at the end over the peak rate.
    pub min_ratio: f64,
}

impl Schedule {
    /// Rate of step `step`, the first being 1. Step w of w warm-up steps has the peak rate; the last step the lowest.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let falling = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        // The first step after the rise has the peak rate, the last one progress 1.
        let progress = ((step - self.warmup_steps - 1) as f64 / (falling.max(2) - 1) as f64).min(1.0);
        let share = match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => 1.0 - progress,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        match self.shape {
            Shape::Constant => self.peak,
            _ => self.peak * (self.min_ratio + (1.0 - self.min_ratio) * share),
        }
    }
}
