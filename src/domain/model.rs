//! `ModelConfig`: the numbers of a decoder that change its arithmetic, read from a Hugging Face `config.json`.

use serde::{Deserialize, Serialize};

use super::{Invalid, machine::DeviceKind};

/// Sizes of attention heads that cuDNN takes on Hopper.
const HEAD_STEP: u64 = 8;
const MOST_HEAD_DIM: u64 = 256;

/// A pre-norm decoder with RMSNorm, grouped-query attention, rotary positions and a SwiGLU feed-forward (the Llama family).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub vocab_size: u64,
    pub hidden_size: u64,
    pub intermediate_size: u64,
    pub n_layers: u64,
    pub n_heads: u64,
    pub n_kv_heads: u64,
    pub head_dim: u64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub rope: Rope,
    /// Longest sequence the model says it was made for; longer ones are trained with a warning.
    pub max_position_embeddings: u64,
}

/// A base model in a host's model folder, as its executor publishes it in `hosts.models`. The API plans with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseModel {
    /// What a job asks for as `model`: the folder's name.
    pub name: String,
    /// Its numbers, where its `config.json` is one that can be trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ModelConfig>,
    /// Why it cannot be trained, where it cannot: shown to whoever asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Rotary position encoding: base and scaling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the inverse frequencies are stretched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// `default`: not at all.
    Default,
    /// Every frequency divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: u64 },
}

impl ModelConfig {
    /// Width of the query projection, `n_heads * head_dim`.
    pub fn q_size(&self) -> u64 {
        self.n_heads * self.head_dim
    }

    /// Width of the key (or value) projection, `n_kv_heads * head_dim`.
    pub fn kv_size(&self) -> u64 {
        self.n_kv_heads * self.head_dim
    }

    /// Refuses a shape that a device has no kernels for.
    pub fn check_on(&self, device: DeviceKind) -> Result<(), Invalid> {
        let d = self.head_dim;
        if device == DeviceKind::Cpu || d.is_multiple_of(HEAD_STEP) && d <= MOST_HEAD_DIM {
            return Ok(());
        }
        let message = format!(
            "attention heads of {d} elements do not train on a GPU, which takes multiples of {HEAD_STEP} up to \
             {MOST_HEAD_DIM}: set training.device to cpu, or take another model"
        );
        Err(Invalid::with_code("unsupported_model", "training.device", message))
    }

    /// Parameters of one layer: q, k, v, o, gate, up, down and two norms.
    pub fn layer_params(&self) -> u64 {
        let h = self.hidden_size;
        h * (2 * self.q_size() + 2 * self.kv_size()) + 3 * h * self.intermediate_size + 2 * h
    }

    /// All parameters; a tied head counts once.
    pub fn n_params(&self) -> u64 {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        tables * self.vocab_size * self.hidden_size + self.n_layers * self.layer_params() + self.hidden_size
    }

    /// Parameters that take part in a matrix product for every token: the layers' and the head's, without norms and embedding look-up.
    pub fn matmul_params(&self) -> u64 {
        let norms = 2 * self.hidden_size;
        self.n_layers * (self.layer_params() - norms) + self.vocab_size * self.hidden_size
    }

    /// Model FLOPs of one training step over documents of these lengths, counted causally and without recompute
    /// (6 N per token, and 12 L nq d times the sum over each document of half its length squared).
    pub fn step_flops(&self, document_lengths: &[u64]) -> f64 {
        let tokens: f64 = document_lengths.iter().map(|n| *n as f64).sum();
        let pairs: f64 = document_lengths.iter().map(|n| (*n as f64) * (*n as f64) / 2.0).sum();
        6.0 * self.matmul_params() as f64 * tokens + 12.0 * (self.n_layers * self.q_size()) as f64 * pairs
    }

    /// Inverse rotary frequencies, `head_dim / 2` of them, in f64 as every angle is
    /// (f32 is off by 0.05 rad at one million tokens).
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let d = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| self.rope.theta.powf(-2.0 * i as f64 / d))
            .map(|f| self.rope.scaling.stretch(f))
            .collect()
    }
}

impl RopeScaling {
    /// The scaled form of one inverse frequency.
    fn stretch(&self, frequency: f64) -> f64 {
        match *self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let old = original_max_position_embeddings as f64;
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < old / high_freq_factor {
                    frequency
                } else if wavelength > old / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (old / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
