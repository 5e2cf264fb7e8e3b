//! `longhaul model init`: a small real model from nothing but documents, as a Hugging Face folder.
//!
//! Llama shape, random weights, and a byte-level BPE tokenizer trained on the documents given. The same flags and documents
//! give the same bytes.

use std::path::{Path, PathBuf};

use serde_json::json;
use tokenizers::{
    AddedToken, TokenizerBuilder,
    models::bpe::{BPE, BpeTrainerBuilder},
    normalizers::NormalizerWrapper,
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::{
    domain::{Invalid, ModelConfig},
    engine::{
        Error, Result,
        backend::{DType, Tensor},
        checkpoint::{huggingface, safetensors::Planned, staging::Staging},
        data::pack::mix,
        model::Params,
    },
};

/// Flags of `longhaul model init`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder to make
    pub folder: PathBuf,
    /// Documents (UTF-8) to train the tokenizer on; may be given several times
    #[arg(long, required = true)]
    pub document: Vec<PathBuf>,
    /// Entries of the vocabulary, special tokens included
    #[arg(long, default_value_t = 4096)]
    pub vocab_size: u64,
    #[arg(long, default_value_t = 4)]
    pub layers: u64,
    #[arg(long, default_value_t = 256)]
    pub hidden_size: u64,
    #[arg(long, default_value_t = 704)]
    pub intermediate_size: u64,
    #[arg(long, default_value_t = 8)]
    pub heads: u64,
    #[arg(long, default_value_t = 4)]
    pub kv_heads: u64,
    /// Longest sequence the model says it is made for
    #[arg(long, default_value_t = 131_072)]
    pub max_position_embeddings: u64,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

const BEGIN: &str = "<|begin_of_text|>";
const END: &str = "<|end_of_text|>";
/// Standard deviation of weights, as in GPT-2 and Llama configs (`initializer_range`).
const DEVIATION: f64 = 0.02;

/// Makes the folder, whole or not at all; refuses one that is there.
pub fn init(args: &Args) -> Result {
    if args.folder.exists() {
        let message = format!("{} exists already: name a new folder or remove it", args.folder.display());
        return Err(Invalid::new("folder", message).into());
    }
    let (tokenizer, vocab_size) = train_tokenizer(args)?;
    let config_text = config(args, vocab_size);
    let config = ModelConfig::from_config_text(&config_text)?;
    let name =
        args.folder.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            Invalid::new("folder", format!("{} does not end in a folder name", args.folder.display()))
        })?;
    let parent = match args.folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(Error::file(parent))?;
    let mut staging = Staging::begin(parent, name)?;
    staging.write_bytes("config.json", config_text.as_bytes())?;
    staging.write_bytes("tokenizer.json", tokenizer.as_bytes())?;
    for (path, value) in [
        (
            "tokenizer_config.json",
            json!({
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
                "clean_up_tokenization_spaces": false, "model_max_length": args.max_position_embeddings,
            }),
        ),
        ("special_tokens_map.json", json!({ "bos_token": BEGIN, "eos_token": END })),
        ("generation_config.json", json!({ "bos_token_id": 0, "eos_token_id": 1, "do_sample": true })),
    ] {
        staging.write_bytes(path, format!("{value:#}\n").as_bytes())?;
    }
    write_weights(&mut staging, &config, args.seed)?;
    staging.finish()?;
    Ok(())
}

fn config(args: &Args, vocab_size: u64) -> String {
    let head_dim = args.hidden_size / args.heads.max(1);
    let value = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": vocab_size, "hidden_size": args.hidden_size, "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": DEVIATION,
        "rope_parameters": { "rope_type": "default", "rope_theta": 500_000.0 },
        "max_position_embeddings": args.max_position_embeddings, "tie_word_embeddings": true,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
    });
    format!("{value:#}\n")
}

/// The text of `tokenizer.json` and the size of its vocabulary, which short documents may leave below what was asked.
fn train_tokenizer(args: &Args) -> Result<(String, u64)> {
    let refuse = |error: tokenizers::Error| {
        Error::from(Invalid::new("--document", format!("no tokenizer could be trained: {error}")))
    };
    if !(258..=1 << 20).contains(&args.vocab_size) {
        let message = format!(
            "--vocab-size must be between 258 (all bytes and two special tokens) and 1048576, not {}",
            args.vocab_size
        );
        return Err(Invalid::new("--vocab-size", message).into());
    }
    let mut texts = Vec::new();
    for path in &args.document {
        let bytes = std::fs::read(path).map_err(Error::file(path))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Invalid::new("--document", format!("{} is not valid UTF-8", path.display())))?;
        texts.push(text);
    }
    let special = |content: &str| AddedToken::from(content, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(args.vocab_size as usize)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![special(BEGIN), special(END)])
        .build();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level.trim_offsets(false)))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(refuse)?;
    tokenizer.train(&mut trainer, texts.iter()).map_err(refuse)?;
    let text = tokenizer.to_string(true).map_err(refuse)?;
    Ok((text, tokenizer.get_vocab_size(true) as u64))
}

/// Random weights in f32, written as they are drawn: normal with deviation 0.02, the projections that feed the residual
/// stream smaller by the square root of twice the layers (GPT-2), gains 1.
fn write_weights(staging: &mut Staging, config: &ModelConfig, seed: u64) -> Result {
    let flat = Tensor::device(0, DType::F32, 1, config.n_params());
    let named = Params::over(config, flat).named(config);
    let planned: Vec<Planned> =
        named.iter().map(|p| Planned { name: p.name.clone(), dtype: DType::F32, shape: p.shape.clone() }).collect();
    huggingface::write_weights(staging, &planned, |writer, i| {
        let (name, gain) = (&planned[i].name, planned[i].shape.len() == 1);
        let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let deviation = if residual { DEVIATION / (2.0 * config.n_layers as f64).sqrt() } else { DEVIATION };
        let first = named[i].first;
        let n = named[i].tensor.elements();
        let mut bytes = Vec::with_capacity(1 << 16);
        for start in (first..first + n).step_by(1 << 14) {
            bytes.clear();
            for index in start..(first + n).min(start + (1 << 14)) {
                let value = if gain { 1.0 } else { deviation * normal(seed, index) };
                bytes.extend_from_slice(&(value as f32).to_le_bytes());
            }
            writer.put(&bytes)?;
        }
        Ok(())
    })
}

/// A standard normal number that (seed, index) alone decides (Box and Muller).
fn normal(seed: u64, index: u64) -> f64 {
    let uniform = |salt: u64| {
        let x = mix(mix(seed ^ salt).wrapping_add(index));
        ((x >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (-2.0 * uniform(1).ln()).sqrt() * (2.0 * std::f64::consts::PI * uniform(2)).cos()
}
