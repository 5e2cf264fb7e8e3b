//! The reference backend: the definition of every operation, plain and in wide arithmetic, on the host's cores.
//!
//! `Cpu<f32>` trains on machines without a GPU, `Cpu<f64>` is what finite differences are taken on, `Cpu<bf16>` stores
//! weights and activations as a GPU does and computes in f32. Every sum runs in an order that the shapes alone decide:
//! the number of threads changes no bit. Copies and events finish inside their call.

pub mod adamw;
mod attention;
mod columns;
mod cross_entropy;
pub mod element;
mod elementwise;
mod embedding;
mod gemm;
mod linear;
mod norm;
mod rope;
mod simd;
mod swiglu;

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

use half::bf16;
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::{
    element::{Storage, num::Float},
    gemm::Gemm,
};
use super::{
    AdamW, AttentionGrads, AttentionSaved, Backend, DType, Heads, OptimizerState, Space, Stream, Tensor, Window,
    arena::{Arena, elements},
    resident,
};
use crate::engine::{Error, Result};

/// One rank on the host's cores, with weights and activations stored as `S`.
#[derive(Debug)]
pub struct Cpu<S> {
    pool: ThreadPool,
    device: Arena,
    host: Arena,
    /// Resident bytes before the arenas were taken.
    resident_before: u64,
    storage: std::marker::PhantomData<S>,
}

impl<S: Storage> Cpu<S> {
    /// A backend on so many threads.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("cpu-{i}")).build();
        let pool = pool.map_err(|error| Error::Device {
            library: "threads",
            call: format!("start {threads}"),
            cause: error.to_string(),
        })?;
        let (device, host) = (Arena::default(), Arena::default());
        Ok(Self { pool, device, host, resident_before: 0, storage: std::marker::PhantomData })
    }

    fn arena(&mut self, space: Space) -> &mut Arena {
        match space {
            Space::Device => &mut self.device,
            Space::Host => &mut self.host,
        }
    }

    fn bytes(&mut self, tensor: Tensor) -> &mut [u8] {
        let [bytes] = self.arena(tensor.space).bytes([tensor]);
        bytes
    }

    /// Runs an operation on views of device tensors, on the pool.
    fn run<const N: usize>(&mut self, tensors: [Tensor; N], operation: impl FnOnce([&mut [u8]; N]) + Send) -> Result {
        assert!(tensors.iter().all(|t| t.space == Space::Device), "operations compute in the device arena");
        let views = self.device.bytes(tensors);
        self.pool.install(|| operation(views));
        Ok(())
    }
}

/// Bytes of a tensor that an operation reads or writes as `E`.
fn typed<E: Storage>(bytes: &mut [u8], tensor: Tensor) -> &mut [E] {
    assert_eq!(tensor.dtype, E::DTYPE, "element type of an operand");
    elements(bytes)
}

fn size(n: u64) -> usize {
    n as usize
}

/// Wide `[1, 1]` of a tensor's first element.
fn scalar<W: Storage>(bytes: &mut [u8], tensor: Tensor) -> W {
    typed::<W>(bytes, tensor)[0]
}

impl<S> Backend for Cpu<S>
where
    S: Storage,
    S::Wide: Gemm,
{
    type Event = ();

    fn storage(&self) -> DType {
        S::DTYPE
    }

    fn wide(&self) -> DType {
        <S::Wide as Storage>::DTYPE
    }

    fn reserve(&mut self, device_bytes: u64, host_bytes: u64) -> Result {
        self.resident_before = resident::resident_bytes();
        let take = |bytes| {
            let lacking = || Error::OutOfMemory { space: "host", bytes, cause: "the system refused it".into() };
            Arena::reserve(bytes).ok_or_else(lacking)
        };
        (self.device, self.host) = (take(device_bytes)?, take(host_bytes)?);
        Ok(())
    }

    fn upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.bytes(to).copy_from_slice(bytes);
        Ok(())
    }

    fn queue_upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.upload(to, bytes)
    }

    fn download(&mut self, from: Tensor, bytes: &mut [u8]) -> Result {
        bytes.copy_from_slice(self.bytes(from));
        Ok(())
    }

    fn copy(&mut self, _: Stream, to: Tensor, from: Tensor) -> Result {
        assert_eq!((to.dtype, to.elements()), (from.dtype, from.elements()), "a copy changes neither type nor size");
        match (to.space, from.space) {
            (Space::Device, Space::Device) => self.run([to, from], |[to, from]| {
                elementwise::map(to, from, |byte| byte);
            })?,
            (Space::Host, Space::Host) => {
                let [to, from] = self.host.bytes([to, from]);
                to.copy_from_slice(from);
            }
            (Space::Device, Space::Host) => {
                let ([to], [from]) = (self.device.bytes([to]), self.host.bytes([from]));
                to.copy_from_slice(from);
            }
            (Space::Host, Space::Device) => {
                let ([to], [from]) = (self.host.bytes([to]), self.device.bytes([from]));
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn spill(&mut self, _: Stream, file: &File, at: u64, from: Tensor) -> Result {
        file.write_all_at(self.bytes(from), at).map_err(Error::file(PathBuf::from("spill file")))
    }

    fn unspill(&mut self, _: Stream, file: &File, at: u64, to: Tensor) -> Result {
        file.read_exact_at(self.bytes(to), at).map_err(Error::file(PathBuf::from("spill file")))
    }

    fn record(&mut self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, _: Stream, (): &()) -> Result {
        Ok(())
    }

    fn synchronize(&mut self) -> Result {
        Ok(())
    }

    fn peak_bytes(&self) -> u64 {
        resident::peak_resident_bytes().saturating_sub(self.resident_before)
    }

    fn peak_host_bytes(&self) -> u64 {
        self.peak_bytes()
    }

    fn touched_bytes(&self) -> u64 {
        resident::resident_bytes_of(self.device.address())
    }

    fn attention_workspace(&self, _: Heads, _: u64, _: u64) -> u64 {
        0
    }

    fn prepare_attention(&mut self, _: Heads, _: &Window) -> Result {
        Ok(())
    }

    fn fill(&mut self, x: Tensor, value: f64) -> Result {
        let [bytes] = match x.space {
            Space::Device => self.device.bytes([x]),
            Space::Host => self.host.bytes([x]),
        };
        self.pool.install(|| match x.dtype {
            DType::F32 => fill(elements::<f32>(bytes), value as f32),
            DType::F64 => fill(elements::<f64>(bytes), value),
            DType::Bf16 => fill(elements::<bf16>(bytes), bf16::from_f64(value)),
            DType::I32 => fill(elements::<i32>(bytes), value as i32),
            DType::U16 => fill(elements::<u16>(bytes), value as u16),
        });
        Ok(())
    }

    fn cast(&mut self, to: Tensor, from: Tensor) -> Result {
        let storage = S::DTYPE;
        self.run([to, from], |[to_bytes, from_bytes]| {
            if from.dtype == storage {
                let to = typed::<S::Wide>(to_bytes, to);
                elementwise::map(to, typed::<S>(from_bytes, from), S::widen);
            } else {
                let to = typed::<S>(to_bytes, to);
                elementwise::map(to, typed::<S::Wide>(from_bytes, from), S::narrow);
            }
        })
    }

    fn accumulate(&mut self, to: Tensor, from: Tensor) -> Result {
        let (storage, wide) = (S::DTYPE, <S::Wide as Storage>::DTYPE);
        self.run([to, from], |[t, f]| match (to.dtype == wide, from.dtype == storage) {
            (true, true) => elementwise::accumulate(typed::<S::Wide>(t, to), typed::<S>(f, from)),
            (true, false) => elementwise::accumulate(typed::<S::Wide>(t, to), typed::<S::Wide>(f, from)),
            (false, true) => elementwise::accumulate(typed::<S>(t, to), typed::<S>(f, from)),
            (false, false) => elementwise::accumulate(typed::<S>(t, to), typed::<S::Wide>(f, from)),
        })
    }

    fn copy_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        assert_eq!((to.0.dtype, to.0.rows), (from.0.dtype, from.0.rows), "columns of matrices of one type and height");
        let bytes = |(tensor, column): (Tensor, u64)| {
            let [cols, column] = [tensor.cols, column].map(|elements| size(elements * tensor.dtype.bytes()));
            (cols, column)
        };
        let ((to_cols, to_first), (from_cols, from_first)) = (bytes(to), bytes(from));
        let width = size(columns * to.0.dtype.bytes());
        if width == 0 {
            return Ok(());
        }
        self.run([to.0, from.0], |[to, from]| {
            let (to, from) = ((to, to_cols, to_first), (&*from, from_cols, from_first));
            columns::by_row(to, from, width, |to, from| to.copy_from_slice(from));
        })
    }

    fn add_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        assert_eq!(to.0.rows, from.0.rows, "columns of matrices of one height");
        if columns == 0 {
            return Ok(());
        }
        self.run([to.0, from.0], |[to_bytes, from_bytes]| {
            let to = (typed::<S::Wide>(to_bytes, to.0), size(to.0.cols), size(to.1));
            let from = (&*typed::<S::Wide>(from_bytes, from.0), size(from.0.cols), size(from.1));
            columns::by_row(to, from, size(columns), |to, from| {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
            });
        })
    }

    fn sum_squares(&mut self, sum: Tensor, x: Tensor) -> Result {
        self.run([sum, x], |[sum_bytes, bytes]| {
            let squares = if x.dtype == S::DTYPE {
                elementwise::sum_squares(typed::<S>(bytes, x))
            } else {
                elementwise::sum_squares(typed::<S::Wide>(bytes, x))
            };
            typed::<S::Wide>(sum_bytes, sum)[0] += S::Wide::of(squares);
        })
    }

    fn clip_scale(&mut self, scale: Tensor, sum: Tensor, max_norm: f64) -> Result {
        self.run([scale, sum], |[scale_bytes, sum_bytes]| {
            let sum = scalar::<S::Wide>(sum_bytes, sum);
            typed::<S::Wide>(scale_bytes, scale)[0] = elementwise::clip_scale(sum, max_norm);
        })
    }

    fn matmul(&mut self, y: Tensor, x: Tensor, w: Tensor, beta: f64) -> Result {
        let (m, n, k) = (size(x.rows), size(w.rows), size(w.cols));
        assert!((y.rows, y.cols, x.cols) == (x.rows, w.rows, w.cols), "matmul {y:?} = {x:?} {w:?}^T");
        self.run([y, x, w], |[a, b, c]| {
            linear::matmul::<S>(typed(a, y), typed::<S>(b, x), typed::<S>(c, w), (m, n, k), beta);
        })
    }

    fn matmul_dx(&mut self, dx: Tensor, dy: Tensor, w: Tensor, beta: f64) -> Result {
        let (m, n, k) = (size(dy.rows), size(w.rows), size(w.cols));
        assert!((dx.rows, dx.cols, dy.cols) == (dy.rows, w.cols, w.rows), "matmul_dx {dx:?} = {dy:?} {w:?}");
        self.run([dx, dy, w], |[a, b, c]| {
            linear::matmul_dx::<S>(typed(a, dx), typed::<S>(b, dy), typed::<S>(c, w), (m, n, k), beta);
        })
    }

    fn matmul_dw(&mut self, dw: Tensor, dy: Tensor, x: Tensor) -> Result {
        let (m, n, k) = (size(dy.rows), size(dw.rows), size(dw.cols));
        assert!((dy.cols, x.rows, x.cols) == (dw.rows, dy.rows, dw.cols), "matmul_dw {dw:?} += {dy:?}^T {x:?}");
        self.run([dw, dy, x], |[a, b, c]| {
            linear::matmul_dw::<S>(typed::<S::Wide>(a, dw), typed(b, dy), typed::<S>(c, x), (m, n, k));
        })
    }

    fn embedding(&mut self, x: Tensor, ids: Tensor, table: Tensor) -> Result {
        let h = size(table.cols);
        self.run([x, ids, table], |[a, ids, c]| {
            embedding::embedding::<S>(typed(a, x), elements(ids), typed::<S>(c, table), h);
        })
    }

    fn embedding_backward(&mut self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result {
        let h = size(dtable.cols);
        self.run([dtable, ids, dx], |[a, ids, c]| {
            embedding::embedding_backward::<S>(typed::<S::Wide>(a, dtable), elements(ids), typed(c, dx), h);
        })
    }

    fn rmsnorm(&mut self, y: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.run([y, x, w], |[a, b, c]| norm::rmsnorm::<S>(typed(a, y), typed(b, x), typed(c, w), eps))
    }

    fn rmsnorm_backward(&mut self, dx: Tensor, dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.run([dx, dw, dy, x, w], |[a, b, c, d, e]| {
            let dw = typed::<S::Wide>(b, dw);
            norm::rmsnorm_backward::<S>(typed(a, dx), dw, typed(c, dy), typed(d, x), typed(e, w), eps);
        })
    }

    fn rope_table(&mut self, table: Tensor, positions: Tensor, frequencies: &[f64]) -> Result {
        self.run([table, positions], |[a, positions]| {
            rope::rope_table(typed::<S::Wide>(a, table), elements(positions), frequencies);
        })
    }

    fn rope_split(
        &mut self,
        q: Option<Tensor>,
        kv: Option<(Tensor, Tensor)>,
        qkv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        let parts = rope::Parts::of(heads, q.is_some(), kv.is_some());
        let absent = Tensor { rows: 0, ..qkv };
        let (q, (k, v)) = (q.unwrap_or(absent), kv.unwrap_or((absent, absent)));
        let d = size(heads.head_dim);
        self.run([q, k, v, qkv, table], |[a, b, c, e, t]| {
            let outputs = (typed::<S>(a, q), typed(b, k), typed(c, v));
            rope::split(outputs, typed(e, qkv), typed::<S::Wide>(t, table), parts, d);
        })
    }

    fn rope_merge_backward(
        &mut self,
        dqkv: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        let parts = rope::Parts::of(heads, true, true);
        let d = size(heads.head_dim);
        self.run([dqkv, dq, dk, dv, table], |[a, b, c, e, t]| {
            let dkv = (&*typed::<S::Wide>(c, dk), &*typed::<S::Wide>(e, dv));
            rope::merge_backward::<S>(typed(a, dqkv), typed(b, dq), dkv, typed::<S::Wide>(t, table), parts, d);
        })
    }

    fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        self.run([o, lse, q, k, v], |[a, l, b, c, e]| {
            let inputs = (&*typed::<S>(b, q), &*typed::<S>(c, k), &*typed::<S>(e, v));
            attention::forward::<S>((typed(a, o), typed::<S::Wide>(l, lse)), inputs, heads, window);
        })
    }

    fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        _workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionGrads { dq, dk, dv, delta } = grads;
        let AttentionSaved { d_o, o, lse, q, k, v } = saved;
        self.run([dq, dk, dv, delta, d_o, o, lse, q, k, v], |[b0, b1, b2, b3, b4, b5, b6, b7, b8, b9]| {
            let saved = attention::Saved::<S> {
                d_o: typed(b4, d_o),
                o: typed(b5, o),
                lse: typed::<S::Wide>(b6, lse),
                q: typed(b7, q),
                k: typed(b8, k),
                v: typed(b9, v),
            };
            let outputs = (typed(b0, dq), typed::<S::Wide>(b1, dk), typed::<S::Wide>(b2, dv));
            attention::backward(outputs, typed::<S::Wide>(b3, delta), &saved, heads, window);
        })
    }

    fn swiglu(&mut self, act: Tensor, gate_up: Tensor) -> Result {
        let f = size(act.cols);
        self.run([act, gate_up], |[a, b]| swiglu::swiglu::<S>(typed(a, act), typed(b, gate_up), f))
    }

    fn swiglu_backward(&mut self, gate_up: Tensor, dact: Tensor) -> Result {
        let f = size(dact.cols);
        self.run([gate_up, dact], |[a, b]| swiglu::swiglu_backward::<S>(typed(a, gate_up), typed(b, dact), f))
    }

    fn cross_entropy(&mut self, sums: Tensor, logits: Tensor, labels: Tensor, gradient: Option<f64>) -> Result {
        let vocab = size(logits.cols);
        self.run([sums, logits, labels], |[s, a, labels]| {
            let sums = typed::<S::Wide>(s, sums);
            cross_entropy::cross_entropy::<S>(sums, typed(a, logits), elements(labels), vocab, gradient);
        })
    }

    fn adamw(&mut self, state: OptimizerState, g: Tensor, scale: Tensor, hyper: &AdamW) -> Result {
        assert!(state.low.is_none() || S::DTYPE == DType::Bf16, "only bf16 weights have a master's low half");
        let low = state.low.unwrap_or(Tensor { dtype: DType::U16, rows: 0, ..state.w });
        self.run([state.w, low, state.m, state.v, g, scale], |bytes| adamw::adamw::<S>(bytes, &state, g, hyper))
    }
}

fn fill<E: Copy + Send + Sync>(x: &mut [E], value: E) {
    use rayon::prelude::*;
    x.par_chunks_mut(1 << 16).for_each(|x| x.fill(value));
}
