//! Every parameter: its Hugging Face name, its shape, its place in one flat run of elements.
//!
//! The same layout serves weights, gradients and both moments, so an update walks four flat tensors. q, k, v lie side by
//! side and so do gate and up: each group is one matrix to a GEMM and several names to a file.

use crate::{domain::ModelConfig, engine::backend::Tensor};

/// One layer's parameters, or their gradients or moments.
#[derive(Debug, Clone, Copy)]
pub struct LayerParams {
    /// `[1, h]`
    pub attention_norm: Tensor,
    /// `[(nq + 2 nk) d, h]`
    pub qkv: Tensor,
    /// `[h, nq d]`
    pub output: Tensor,
    /// `[1, h]`
    pub mlp_norm: Tensor,
    /// `[2 f, h]`
    pub gate_up: Tensor,
    /// `[h, f]`
    pub down: Tensor,
}

impl LayerParams {
    /// The same shapes over another flat run of as many elements.
    ///
    /// # Panics
    /// When that is shorter.
    #[must_use]
    pub fn over(&self, flat: Tensor) -> Self {
        let mut pieces = Pieces { flat, taken: 0 };
        let mut like = |tensor: Tensor| pieces.take(tensor.rows, tensor.cols);
        Self {
            attention_norm: like(self.attention_norm),
            qkv: like(self.qkv),
            output: like(self.output),
            mlp_norm: like(self.mlp_norm),
            gate_up: like(self.gate_up),
            down: like(self.down),
        }
    }
}

/// All parameters, or their gradients or moments.
#[derive(Debug, Clone)]
pub struct Params {
    /// `[V, h]`
    pub embedding: Tensor,
    pub layers: Vec<LayerParams>,
    /// `[1, h]`
    pub norm: Tensor,
    /// `[V, h]`; the embedding itself when tied.
    pub head: Tensor,
}

/// One parameter as a file knows it.
#[derive(Debug, Clone)]
pub struct Named {
    pub name: String,
    /// One dimension for norms, two for matrices.
    pub shape: Vec<u64>,
    pub tensor: Tensor,
    /// Its first element's index in the flat order of all parameters.
    pub first: u64,
}

impl Named {
    /// Number of its elements.
    pub fn elements(&self) -> u64 {
        self.tensor.elements()
    }
}

/// Hands out consecutive pieces of a flat tensor.
struct Pieces {
    flat: Tensor,
    taken: u64,
}

impl Pieces {
    fn take(&mut self, rows: u64, cols: u64) -> Tensor {
        let n = rows * cols;
        self.taken += n;
        self.flat.part(self.taken - n, n).shaped(rows, cols)
    }
}

impl Params {
    /// Parameters laid over a flat tensor of [`ModelConfig::n_params`] elements.
    ///
    /// # Panics
    /// When the tensor is smaller.
    pub fn over(config: &ModelConfig, flat: Tensor) -> Self {
        let vocabulary = config.vocab_size * config.hidden_size;
        let mut end = 0;
        let mut take = |n: u64| {
            end += n;
            flat.part(end - n, n)
        };
        let embedding = take(vocabulary);
        let layers: Vec<Tensor> = (0..config.n_layers).map(|_| take(config.layer_params())).collect();
        let norm = take(config.hidden_size);
        let head = (!config.tie_word_embeddings).then(|| take(vocabulary));
        Self::of_units(config, embedding, layers, norm, head)
    }

    /// Parameters of which each unit is a flat tensor of at least its elements; no head when it is the embedding.
    ///
    /// # Panics
    /// When a unit's tensor is smaller.
    pub fn of_units(
        config: &ModelConfig,
        embedding: Tensor,
        layers: impl IntoIterator<Item = Tensor>,
        norm: Tensor,
        head: Option<Tensor>,
    ) -> Self {
        let (h, f, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let layer = |flat: Tensor| {
            let mut pieces = Pieces { flat, taken: 0 };
            LayerParams {
                attention_norm: pieces.take(1, h),
                qkv: pieces.take(config.q_size() + 2 * config.kv_size(), h),
                output: pieces.take(h, config.q_size()),
                mlp_norm: pieces.take(1, h),
                gate_up: pieces.take(2 * f, h),
                down: pieces.take(h, f),
            }
        };
        let embedding = embedding.shaped(vocab, h);
        Self {
            embedding,
            layers: layers.into_iter().map(layer).collect(),
            norm: norm.shaped(1, h),
            head: head.map_or(embedding, |head| head.shaped(vocab, h)),
        }
    }

    /// Every parameter under its Hugging Face name, in the order of the flat layout. A tied head has no name of its own.
    pub fn named(&self, config: &ModelConfig) -> Vec<Named> {
        let (q, kv, f) = (config.q_size(), config.kv_size(), config.intermediate_size);
        let named = |name, shape, tensor| Named { name, shape, tensor, first: 0 };
        let matrix = |name: String, tensor: Tensor| named(name, vec![tensor.rows, tensor.cols], tensor);
        let vector = |name: String, tensor: Tensor| named(name, vec![tensor.cols], tensor);
        let mut out = vec![matrix("model.embed_tokens.weight".into(), self.embedding)];
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            out.extend([
                vector(name("input_layernorm"), layer.attention_norm),
                matrix(name("self_attn.q_proj"), layer.qkv.rows(0, q)),
                matrix(name("self_attn.k_proj"), layer.qkv.rows(q, q + kv)),
                matrix(name("self_attn.v_proj"), layer.qkv.rows(q + kv, q + 2 * kv)),
                matrix(name("self_attn.o_proj"), layer.output),
                vector(name("post_attention_layernorm"), layer.mlp_norm),
                matrix(name("mlp.gate_proj"), layer.gate_up.rows(0, f)),
                matrix(name("mlp.up_proj"), layer.gate_up.rows(f, 2 * f)),
                matrix(name("mlp.down_proj"), layer.down),
            ]);
        }
        out.push(vector("model.norm.weight".into(), self.norm));
        if !config.tie_word_embeddings {
            out.push(matrix("lm_head.weight".into(), self.head));
        }
        let mut first = 0;
        for parameter in &mut out {
            parameter.first = first;
            first += parameter.tensor.elements();
        }
        out
    }
}
