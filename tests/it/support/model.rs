//! Small models on the CPU backend: sessions with known weights, batches of several documents, gradients as numbers.

use std::ops::Range;

use longhaul::{
    domain::{
        Machine, ModelConfig,
        machine::{DeviceKind, Rates},
        model::{Rope, RopeScaling},
        training::{Moments, Precision},
    },
    engine::{
        backend::{Backend, DType, Tensor, cpu::Cpu},
        model::{Batch, params::Named},
        train::session::Session,
    },
    plan::{self, Forced, Plan, Widths},
};

/// A machine with room for everything in these tests.
pub fn machine(bytes: u64) -> Machine {
    Machine {
        device: DeviceKind::Cpu,
        device_name: "test".into(),
        n_devices: 1,
        network: None,
        device_bytes: bytes,
        host_bytes: 0,
        disk_bytes: 1 << 30,
        rates: Rates {
            gemm_flops: 1e11,
            attention_flops: 1e11,
            memory_bytes: 2e10,
            link_bytes: 1e10,
            peer_bytes: 1e10,
            disk_bytes: 1e9,
            source: "assumed".into(),
        },
    }
}

/// A GPU that nobody has, beside some host memory.
pub fn gpu(bytes: u64) -> Machine {
    let device_name = "NVIDIA Test".into();
    Machine { device: DeviceKind::Cuda, device_name, host_bytes: 2 << 30, ..machine(bytes) }
}

/// A Llama with grouped queries: five layers, so that segments of several lengths fit.
pub fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        hidden_size: 24,
        intermediate_size: 40,
        n_layers: 5,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
        max_position_embeddings: 512,
    }
}

/// A plan in f64 with these choices.
pub fn plan_f64(config: &ModelConfig, tokens: u64, forced: Forced) -> Plan {
    let forced = Forced { widths: Some(Widths { storage: 8, wide: 8 }), ..forced };
    let machine = machine(1 << 32);
    let (precision, moments, machine) = (Precision::F32, Moments::F32, &machine);
    let request = plan::Request { model: config, precision, moments, tokens, micro_batches: 2, machine, forced };
    plan::plan(&request).expect("a small model fits")
}

/// A session in f64 under this plan, with weights that depend only on the seed.
pub fn session_f64(config: &ModelConfig, plan: &Plan, seed: u64) -> Session<Cpu<f64>> {
    let cpu = Cpu::<f64>::new(2).expect("a CPU");
    let mut session = Session::new(cpu, plan, config, &std::env::temp_dir()).expect("a session");
    let mut random = Random(seed);
    for parameter in session.weights() {
        let base = if parameter.shape.len() == 1 { 1.0 } else { 0.0 };
        let values: Vec<f64> = (0..parameter.tensor.elements()).map(|_| base + 0.2 * random.signed()).collect();
        write(&mut session.backend, parameter.tensor, &values);
    }
    session
}

/// Writes numbers into a float tensor.
pub fn write<B: Backend>(b: &mut B, to: Tensor, values: &[f64]) {
    let bytes: Vec<u8> = match to.dtype {
        DType::F64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|v| half::bf16::from_f64(*v).to_le_bytes()).collect(),
        other => panic!("{other:?} holds no floats"),
    };
    b.upload(to, &bytes).expect("upload");
}

/// A tensor's bytes.
pub fn read_bytes<B: Backend>(b: &mut B, from: Tensor) -> Vec<u8> {
    let mut bytes = vec![0; from.bytes() as usize];
    b.synchronize().expect("synchronize");
    b.download(from, &mut bytes).expect("download");
    bytes
}

/// Reads a float tensor as numbers.
pub fn read<B: Backend>(b: &mut B, from: Tensor) -> Vec<f64> {
    let bytes = read_bytes(b, from);
    match from.dtype {
        DType::F64 => bytes.chunks_exact(8).map(|c| f64::from_le_bytes(c.try_into().unwrap())).collect(),
        DType::F32 => bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()).into()).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|c| half::bf16::from_le_bytes(c.try_into().unwrap()).into()).collect(),
        other => panic!("{other:?} holds no floats"),
    }
}

/// A sequence of several documents, owned.
pub struct Tokens {
    pub ids: Vec<i32>,
    pub labels: Vec<i32>,
    pub positions: Vec<i32>,
    pub documents: Vec<Range<u64>>,
}

impl Tokens {
    /// Random documents of these lengths: labels shifted, the last of each masked.
    pub fn random(vocab: u64, lengths: &[u64], seed: u64) -> Self {
        let mut random = Random(seed);
        let document = |length: &u64| (0..*length).map(|_| (random.next() % vocab) as i32).collect();
        Self::of(&lengths.iter().map(document).collect::<Vec<Vec<i32>>>())
    }

    /// One document with something to learn: every token is one of four that its predecessor allows.
    pub fn chain(vocab: u64, length: u64, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut token = random.next() % vocab;
        let mut document = Vec::new();
        for _ in 0..length {
            document.push(token as i32);
            token = (5 * token + 17 * (random.next() % 4) + 1) % vocab;
        }
        Self::of(&[document])
    }

    /// These documents in one sequence: labels shifted, the last of each masked.
    pub fn of(documents: &[Vec<i32>]) -> Self {
        Self::padded(documents, 1)
    }

    /// The same with every document padded at its end to a multiple of `pad_to` tokens.
    pub fn padded(documents: &[Vec<i32>], pad_to: usize) -> Self {
        let mut out = Self { ids: vec![], labels: vec![], positions: vec![], documents: vec![] };
        for document in documents {
            let start = out.ids.len();
            let end = start + document.len().next_multiple_of(pad_to);
            out.ids.extend(document);
            out.ids.resize(end, 0);
            out.labels.extend_from_slice(&document[1..]);
            out.labels.resize(end, -100);
            out.positions.extend(0..(end - start) as i32);
            out.documents.push(start as u64..end as u64);
        }
        out
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch { ids: &self.ids, labels: &self.labels, positions: &self.positions, documents: &self.documents }
    }
}

/// Loss and every gradient of these batches, by name.
pub fn gradients<B: Backend>(session: &mut Session<B>, batches: &[Batch]) -> (f64, Vec<(String, Vec<f64>)>) {
    session.gradients(batches).expect("forward and backward");
    let loss = session.totals().expect("totals").mean_loss();
    let grads = session.grads();
    let values = grads.into_iter().map(|Named { name, tensor, .. }| (name, read(&mut session.backend, tensor)));
    (loss, values.collect())
}

/// `||a - b|| / ||b||`.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum();
    let norm: f64 = b.iter().map(|y| y * y).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// xorshift64*, for test data.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Uniform in -1..1.
    pub fn signed(&mut self) -> f64 {
        (self.next() % (1 << 40)) as f64 / (1u64 << 39) as f64 - 1.0
    }
}
