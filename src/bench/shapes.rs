//! Model shapes known by name, so that a figure can be compared without a model folder.

use crate::domain::{
    ModelConfig,
    model::{Rope, RopeScaling},
};

/// Names that [`named`] knows.
pub const NAMES: [&str; 6] = ["tiny", "10m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b"];

/// Widths of a decoder, in the order vocabulary, hidden, feed-forward, layers, heads, kv heads, head size.
struct Widths(u64, u64, u64, u64, u64, u64, u64);

/// The shape of that name.
pub fn named(name: &str) -> Option<ModelConfig> {
    let llama3 = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let (widths, tied, scaling) = match name {
        "tiny" => (Widths(2048, 128, 384, 4, 4, 2, 32), true, RopeScaling::Default),
        "10m" => (Widths(8192, 256, 768, 8, 4, 2, 64), false, RopeScaling::Default),
        "llama-3.2-1b" => (Widths(128_256, 2048, 8192, 16, 32, 8, 64), true, llama3(32.0)),
        "llama-3.2-3b" => (Widths(128_256, 3072, 8192, 28, 24, 8, 128), true, llama3(32.0)),
        "llama-3.1-8b" => (Widths(128_256, 4096, 14_336, 32, 32, 8, 128), false, llama3(8.0)),
        "llama-3.1-70b" => (Widths(128_256, 8192, 28_672, 80, 64, 8, 128), false, llama3(8.0)),
        _ => return None,
    };
    let Widths(vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim) = widths;
    Some(ModelConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        rope: Rope { theta: 500_000.0, scaling },
        max_position_embeddings: 131_072,
    })
}
