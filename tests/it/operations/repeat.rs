//! Every operation once, small, in shapes that reach every kernel of a GPU: what it wrote, for comparing bits between runs and
//! numbers between backends. `gpu::operations` runs it there; here the CPU backend repeats itself on any number of threads.

use longhaul::engine::backend::{
    AdamW, AttentionGrads, AttentionSaved, Backend, DType, Heads, OptimizerState, Tensor, Window,
    cpu::{Cpu, adamw},
};

use super::Bench;

/// Room for every tensor of a run, and for the attention workspace of a GPU.
const ARENA_BYTES: u64 = 24 << 20;
/// Rows of the layer operations: 64 more than a multiple of 128.
const ROWS: u64 = 192;
const KEYS: u64 = 320;
const ATTENTION: Heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 64 };
const EPSILON: f64 = 1e-5;

/// Shapes of a run.
#[derive(Debug, Clone, Copy)]
pub struct Shapes {
    hidden: u64,
    intermediate: u64,
    vocab: u64,
    heads: Heads,
    /// m, n, k of the matrix products.
    product: (u64, u64, u64),
    /// Parameters of flat operations, and the element of their tensors where they begin.
    flat: u64,
    first: u64,
}

/// Rows and addresses that vectors of 16 bytes divide.
pub const EVEN: Shapes = Shapes {
    hidden: 64,
    intermediate: 96,
    vocab: 2048,
    heads: Heads { n_heads: 4, n_kv_heads: 2, head_dim: 64 },
    product: (ROWS, 96, 64),
    flat: 40_000,
    first: 0,
};
/// Neither.
pub const ODD: Shapes = Shapes {
    hidden: 61,
    intermediate: 93,
    vocab: 2047,
    heads: Heads { n_heads: 3, n_kv_heads: 1, head_dim: 6 },
    product: (ROWS - 1, 97, 61),
    flat: 40_003,
    first: 1,
};

/// What an operation wrote: its name, and the tensor with its type and bytes.
pub struct Output {
    pub operation: &'static str,
    pub dtype: DType,
    pub bytes: Vec<u8>,
}

impl Output {
    /// Its elements as numbers; low halves as integers.
    pub fn values(&self) -> Vec<f64> {
        let halves = || self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            DType::Bf16 => halves().map(|bits| half::bf16::from_bits(bits).into()).collect(),
            DType::U16 => halves().map(f64::from).collect(),
            DType::F32 => {
                self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            other => panic!("no operation writes {other:?}"),
        }
    }
}

/// Which operations of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that a GPU does in kernels of our own alone.
    Own,
    /// Matrix products and attention too, which its libraries do.
    All,
}

/// Runs the operations on inputs that depend on nothing but the shapes. The backend comes back with its arena taken.
pub fn outputs<B: Backend>(b: B, shapes: Shapes, which: Which) -> (B, Vec<Output>) {
    let mut bench = Bench::sized(b, 71, ARENA_BYTES);
    let mut written = flat(&mut bench, shapes);
    written.extend(columns(&mut bench, shapes));
    written.extend(rows(&mut bench, shapes));
    written.extend(positions(&mut bench, shapes.heads));
    if which == Which::All {
        written.extend(products(&mut bench, shapes.product));
        written.extend(attention(&mut bench));
    }
    bench.b.synchronize().unwrap();
    let download = |(operation, tensor): (&'static str, Tensor)| {
        let mut bytes = vec![0; tensor.bytes() as usize];
        bench.b.download(tensor, &mut bytes).unwrap();
        Output { operation, dtype: tensor.dtype, bytes }
    };
    let outputs = written.into_iter().map(download).collect();
    (bench.b, outputs)
}

type Written = Vec<(&'static str, Tensor)>;

/// Elementwise operations and the update.
fn flat<B: Backend>(bench: &mut Bench<B>, shapes: Shapes) -> Written {
    let (n, first) = (shapes.flat, shapes.first);
    let part = |tensor: Tensor| tensor.part(first, n);
    let length = n + first;
    let (stored, sum) = (part(bench.input(1, length)), part(bench.sum(1, length)));
    let [filled, narrowed] = [(); 2].map(|()| part(bench.output(1, length)));
    let (words, widened) = (part(bench.sum(1, length)), part(bench.sum(1, length)));
    bench.b.fill(filled, 3.0).unwrap();
    bench.b.fill(words, 0.7).unwrap();
    bench.b.cast(narrowed, sum).unwrap();
    bench.b.cast(widened, stored).unwrap();
    let (added, added_wide) = (part(bench.input(1, length)), part(bench.sum(1, length)));
    bench.b.accumulate(added, sum).unwrap();
    bench.b.accumulate(added_wide, stored).unwrap();
    let [squares, stored_squares, scale] = [(); 3].map(|()| bench.sum(1, 1));
    bench.b.sum_squares(squares, sum).unwrap();
    bench.b.sum_squares(stored_squares, stored).unwrap();
    bench.b.clip_scale(scale, squares, 1.0).unwrap();
    let mut written = vec![
        ("fill", filled),
        ("fill wide", words),
        ("cast", narrowed),
        ("cast wide", widened),
        ("accumulate", added),
        ("accumulate wide", added_wide),
        ("sum_squares", squares),
        ("sum_squares of storage", stored_squares),
        ("clip_scale", scale),
    ];
    for split in [true, false] {
        for moments in [DType::F32, DType::Bf16] {
            written.extend(update(bench, shapes, split, moments, if split { stored } else { sum }));
        }
    }
    written
}

/// Blocks of columns from one matrix into another.
fn columns<B: Backend>(bench: &mut Bench<B>, shapes: Shapes) -> Written {
    let (h, f) = (shapes.hidden, shapes.intermediate);
    let (from, to) = (bench.input(ROWS, h), bench.input(ROWS, f));
    bench.b.copy_columns((to, f / 2), (from, h / 4), h / 2).unwrap();
    let (wide_from, wide_to, added) = (bench.sum(ROWS, h), bench.sum(ROWS, f), bench.sum(ROWS, f));
    bench.b.copy_columns((wide_to, 0), (wide_from, h / 2), h / 4).unwrap();
    bench.b.add_columns((added, f / 2), (wide_from, h / 4), h / 2).unwrap();
    vec![("copy_columns", to), ("copy_columns wide", wide_to), ("add_columns", added)]
}

/// One AdamW step of a split or whole master.
fn update<B: Backend>(bench: &mut Bench<B>, shapes: Shapes, split: bool, moments: DType, g: Tensor) -> Written {
    let length = shapes.flat + shapes.first;
    let part = |tensor: Tensor| tensor.part(shapes.first, shapes.flat);
    let masters: Vec<f32> = bench.weights(length).into_iter().map(|x| x as f32).collect();
    let (w, low) = if split {
        let halves: Vec<_> = masters.iter().map(|master| adamw::parts(*master)).collect();
        let (w, low) = (bench.output(1, length), bench.empty(DType::U16, 1, length));
        let [high, rest]: [Vec<u8>; 2] = [
            halves.iter().flat_map(|(weight, _)| weight.to_le_bytes()).collect(),
            halves.iter().flat_map(|(_, low)| low.to_le_bytes()).collect(),
        ];
        bench.b.upload(w, &high).unwrap();
        bench.b.upload(low, &rest).unwrap();
        (w, Some(low))
    } else {
        (bench.sum(1, length), None)
    };
    let [m, v] = [(); 2].map(|()| bench.empty(moments, 1, length));
    let scale = bench.sum(1, 1);
    for (tensor, value) in [(m, 0.0), (v, 0.0), (scale, 0.7)] {
        bench.b.fill(tensor, value).unwrap();
    }
    let state = OptimizerState { w: part(w), low: low.map(part), m: part(m), v: part(v) };
    let hyper = AdamW {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 2,
        seed: 77,
        first_index: 5,
    };
    bench.b.adamw(state, g, scale, &hyper).unwrap();
    let mut written = vec![("adamw", state.w), ("adamw m", state.m), ("adamw v", state.v)];
    written.extend(state.low.map(|low| ("adamw low", low)));
    written
}

/// Operations on rows: embedding, norms, SwiGLU, cross entropy.
fn rows<B: Backend>(bench: &mut Bench<B>, shapes: Shapes) -> Written {
    let Shapes { hidden: h, intermediate: f, vocab, .. } = shapes;
    let ids: Vec<i32> = (0..ROWS as i32).map(|i| (i * i) % 97).collect();
    let (ids, table, x) = (bench.indices(&ids), bench.input(vocab, h), bench.output(ROWS, h));
    bench.b.embedding(x, ids, table).unwrap();
    let (dtable, dx) = (bench.sum(vocab, h), bench.input(ROWS, h));
    bench.b.embedding_backward(dtable, ids, dx).unwrap();

    let (gain, y, dgain, dy) = (bench.input(1, h), bench.output(ROWS, h), bench.sum(1, h), bench.input(ROWS, h));
    bench.b.rmsnorm(y, x, gain, EPSILON).unwrap();
    bench.b.rmsnorm_backward(dx, dgain, dy, x, gain, EPSILON).unwrap();

    let (gate_up, act, dact) = (bench.input(ROWS, 2 * f), bench.output(ROWS, f), bench.input(ROWS, f));
    bench.b.swiglu(act, gate_up).unwrap();
    bench.b.swiglu_backward(gate_up, dact).unwrap();

    let labels: Vec<i32> = (0..ROWS as i32).map(|i| if i % 7 == 0 { -100 } else { i * 5 % 61 }).collect();
    let (labels, logits, sums, alone) =
        (bench.indices(&labels), bench.input(ROWS, vocab), bench.sum(1, 2), bench.sum(1, 2));
    bench.b.cross_entropy(alone, logits, labels, None).unwrap();
    bench.b.cross_entropy(sums, logits, labels, Some(0.01)).unwrap();
    vec![
        ("embedding", x),
        ("embedding_backward", dtable),
        ("rmsnorm", y),
        ("rmsnorm_backward", dx),
        ("rmsnorm_backward gain", dgain),
        ("swiglu", act),
        ("swiglu_backward", gate_up),
        ("cross_entropy alone", alone),
        ("cross_entropy", sums),
        ("cross_entropy gradient", logits),
    ]
}

/// Rotary positions.
fn positions<B: Backend>(bench: &mut Bench<B>, heads: Heads) -> Written {
    let Heads { n_heads, n_kv_heads, head_dim: d } = heads;
    let (q_cols, kv_cols) = (n_heads * d, n_kv_heads * d);
    let places: Vec<i32> = (0..ROWS as i32).map(|i| i * 4001).collect();
    let frequencies: Vec<f64> = (0..d / 2).map(|j| 10_000f64.powf(-2.0 * j as f64 / d as f64)).collect();
    let (places, table) = (bench.indices(&places), bench.sum(ROWS, d));
    bench.b.rope_table(table, places, &frequencies).unwrap();
    let qkv = bench.input(ROWS, q_cols + 2 * kv_cols);
    let (q, k, v) = (bench.output(ROWS, q_cols), bench.output(ROWS, kv_cols), bench.output(ROWS, kv_cols));
    bench.b.rope_split(Some(q), Some((k, v)), qkv, table, heads).unwrap();
    let (dq, dk, dv) = (bench.input(ROWS, q_cols), bench.sum(ROWS, kv_cols), bench.sum(ROWS, kv_cols));
    let dqkv = bench.output(ROWS, q_cols + 2 * kv_cols);
    bench.b.rope_merge_backward(dqkv, dq, dk, dv, table, heads).unwrap();
    vec![
        ("rope_table", table),
        ("rope_split q", q),
        ("rope_split k", k),
        ("rope_split v", v),
        ("rope_merge_backward", dqkv),
    ]
}

/// Matrix products, with and without what was there before.
fn products<B: Backend>(bench: &mut Bench<B>, (m, n, k): (u64, u64, u64)) -> Written {
    let (x, w, dy) = (bench.input(m, k), bench.input(n, k), bench.input(m, n));
    let (y, added, dx, dw) = (bench.output(m, n), bench.input(m, n), bench.output(m, k), bench.sum(n, k));
    bench.b.matmul(y, x, w, 0.0).unwrap();
    bench.b.matmul(added, x, w, 1.0).unwrap();
    bench.b.matmul_dx(dx, dy, w, 0.0).unwrap();
    bench.b.matmul_dw(dw, dy, x).unwrap();
    vec![("matmul", y), ("matmul added", added), ("matmul_dx", dx), ("matmul_dw", dw)]
}

/// A chunk behind a prefix, 64 more than a multiple of 128.
fn attention<B: Backend>(bench: &mut Bench<B>) -> Written {
    let heads = ATTENTION;
    let (q_cols, kv_cols) = (heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim);
    let (q, d_o) = (bench.input(ROWS, q_cols), bench.input(ROWS, q_cols));
    let (k, v) = (bench.input(KEYS, kv_cols), bench.input(KEYS, kv_cols));
    let (o, dq) = (bench.output(ROWS, q_cols), bench.output(ROWS, q_cols));
    let (lse, delta) = (bench.sum(heads.n_heads, ROWS), bench.sum(heads.n_heads, ROWS));
    let (dk, dv) = (bench.sum(KEYS, kv_cols), bench.sum(KEYS, kv_cols));
    let bytes = bench.b.attention_workspace(heads, ROWS, KEYS);
    let workspace = bench.empty(DType::U16, 1, bytes / 2);
    let document = 0..KEYS;
    let window = Window { chunk: KEYS - ROWS..KEYS, documents: std::slice::from_ref(&document) };
    bench.b.attention(o, lse, q, k, v, workspace, heads, &window).unwrap();
    let saved = AttentionSaved { d_o, o, lse, q, k, v };
    bench.b.attention_backward(AttentionGrads { dq, dk, dv, delta }, saved, workspace, heads, &window).unwrap();
    vec![
        ("attention", o),
        ("attention lse", lse),
        ("attention_backward dq", dq),
        ("attention_backward dk", dk),
        ("attention_backward dv", dv),
    ]
}

#[test]
fn operations_repeat_themselves_on_any_number_of_threads() {
    for shapes in [EVEN, ODD] {
        let run = |threads| outputs(Cpu::<half::bf16>::new(threads).unwrap(), shapes, Which::All).1;
        for (one, three) in run(1).iter().zip(run(3)) {
            assert!(one.values().iter().all(|x| x.is_finite()), "{} wrote every element", one.operation);
            assert!(one.bytes == three.bytes, "{} depends on the number of threads", one.operation);
        }
    }
}
