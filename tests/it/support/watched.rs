//! A backend that watches the order of its streams. Streams of the CPU finish inside each call, so that an event that is missing
//! changes nothing there; here every operation says what it reads and writes on which stream, events carry what happened before
//! them, and two operations on one place, of which one writes, must be ordered by them.

use std::{fs::File, ops::Range};

use longhaul::engine::{
    Result,
    backend::{
        AdamW, AttentionGrads, AttentionSaved, Backend, DType, Heads, OptimizerState, Space, Stream, Tensor, Window,
    },
    comm::Comm,
};

const STREAMS: [Stream; 5] = [Stream::Compute, Stream::Down, Stream::Up, Stream::Exchange, Stream::Gather];

/// Of each stream the number of operations that are done.
type Clock = [u64; STREAMS.len()];

/// A backend and what was done on it.
pub struct Watched<B> {
    pub b: B,
    /// What each stream's next operation comes after.
    clocks: [Clock; STREAMS.len()],
    accesses: Vec<Access>,
    /// Called before the host waits for the device.
    pub waits: Option<Box<dyn FnMut() + Send>>,
    /// Operations that nothing orders.
    pub races: Vec<String>,
    /// Operations that were held against others.
    pub operations: u64,
}

struct Access {
    what: &'static str,
    stream: usize,
    /// Number on its stream.
    nth: u64,
    space: Space,
    bytes: Range<u64>,
    writes: bool,
}

fn number(stream: Stream) -> usize {
    STREAMS.iter().position(|s| *s == stream).expect("a stream")
}

fn later(a: &mut Clock, b: &Clock) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a = (*a).max(*b));
}

impl<B: Backend> Watched<B> {
    pub fn new(b: B) -> Self {
        let clocks = [[0; STREAMS.len()]; STREAMS.len()];
        Self { b, clocks, accesses: Vec::new(), waits: None, races: Vec::new(), operations: 0 }
    }

    fn on(&mut self, stream: Stream, what: &'static str, reads: &[Tensor], writes: &[Tensor]) -> &mut B {
        let stream = number(stream);
        self.clocks[stream][stream] += 1;
        let (clock, nth) = (self.clocks[stream], self.clocks[stream][stream]);
        let both = reads.iter().map(|t| (t, false)).chain(writes.iter().map(|t| (t, true)));
        let new = both.filter(|(t, _)| t.elements() > 0).map(|(t, writes)| {
            let bytes = t.offset..t.offset + t.bytes();
            Access { what, stream, nth, space: t.space, bytes, writes }
        });
        let new: Vec<Access> = new.collect();
        for (new, old) in new.iter().flat_map(|new| self.accesses.iter().map(move |old| (new, old))) {
            let meet = new.bytes.start < old.bytes.end && old.bytes.start < new.bytes.end && new.space == old.space;
            if meet && (new.writes || old.writes) && clock[old.stream] < old.nth {
                let of = |a: &Access| format!("{} on {:?}", a.what, STREAMS[a.stream]);
                self.races.push(format!("{} beside {}", of(new), of(old)));
            }
        }
        self.accesses.extend(new);
        self.operations += 1;
        if self.operations.is_multiple_of(64) {
            self.forget();
        }
        &mut self.b
    }

    fn compute(&mut self, what: &'static str, reads: &[Tensor], writes: &[Tensor]) -> &mut B {
        self.on(Stream::Compute, what, reads, writes)
    }

    /// Forgets what every stream comes after anyway.
    fn forget(&mut self) {
        let clocks = self.clocks;
        self.accesses.retain(|old| clocks.iter().any(|clock| clock[old.stream] < old.nth));
    }

    /// The host waits for all streams.
    fn join(&mut self) {
        if let Some(waits) = &mut self.waits {
            waits();
        }
        let mut all = Clock::default();
        self.clocks.iter().for_each(|clock| later(&mut all, clock));
        self.clocks = [all; STREAMS.len()];
        self.forget();
    }
}

/// Rows of keys or values that a window's queries see.
fn seen(x: Tensor, window: &Window) -> Tensor {
    x.rows(window.documents.first().map_or(0, |document| document.start), window.chunk.end)
}

impl<B: Backend> Backend for Watched<B> {
    type Event = (Clock, B::Event);

    fn storage(&self) -> DType {
        self.b.storage()
    }

    fn wide(&self) -> DType {
        self.b.wide()
    }

    fn reserve(&mut self, device_bytes: u64, host_bytes: u64) -> Result {
        self.b.reserve(device_bytes, host_bytes)
    }

    fn upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.join();
        self.b.upload(to, bytes)
    }

    fn queue_upload(&mut self, to: Tensor, bytes: &[u8]) -> Result {
        self.on(Stream::Compute, "queue_upload", &[], &[to]).queue_upload(to, bytes)
    }

    fn download(&mut self, from: Tensor, bytes: &mut [u8]) -> Result {
        self.join();
        self.b.download(from, bytes)
    }

    fn copy(&mut self, stream: Stream, to: Tensor, from: Tensor) -> Result {
        self.on(stream, "copy", &[from], &[to]).copy(stream, to, from)
    }

    fn spill(&mut self, stream: Stream, file: &File, at: u64, from: Tensor) -> Result {
        self.on(stream, "spill", &[from], &[]).spill(stream, file, at, from)
    }

    fn unspill(&mut self, stream: Stream, file: &File, at: u64, to: Tensor) -> Result {
        self.on(stream, "unspill", &[], &[to]).unspill(stream, file, at, to)
    }

    fn record(&mut self, stream: Stream) -> Result<Self::Event> {
        Ok((self.clocks[number(stream)], self.b.record(stream)?))
    }

    fn wait(&mut self, stream: Stream, (clock, event): &Self::Event) -> Result {
        later(&mut self.clocks[number(stream)], clock);
        self.b.wait(stream, event)
    }

    fn synchronize(&mut self) -> Result {
        self.join();
        self.b.synchronize()
    }

    fn peak_bytes(&self) -> u64 {
        self.b.peak_bytes()
    }

    fn peak_host_bytes(&self) -> u64 {
        self.b.peak_host_bytes()
    }

    fn touched_bytes(&self) -> u64 {
        self.b.touched_bytes()
    }

    fn attention_workspace(&self, heads: Heads, c: u64, kv: u64) -> u64 {
        self.b.attention_workspace(heads, c, kv)
    }

    fn prepare_attention(&mut self, heads: Heads, window: &Window) -> Result {
        self.b.prepare_attention(heads, window)
    }

    fn fill(&mut self, x: Tensor, value: f64) -> Result {
        self.compute("fill", &[], &[x]).fill(x, value)
    }

    fn cast(&mut self, to: Tensor, from: Tensor) -> Result {
        self.compute("cast", &[from], &[to]).cast(to, from)
    }

    fn accumulate(&mut self, to: Tensor, from: Tensor) -> Result {
        self.compute("accumulate", &[from], &[to]).accumulate(to, from)
    }

    fn copy_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        self.compute("copy_columns", &[from.0], &[to.0]).copy_columns(to, from, columns)
    }

    fn add_columns(&mut self, to: (Tensor, u64), from: (Tensor, u64), columns: u64) -> Result {
        self.compute("add_columns", &[from.0], &[to.0]).add_columns(to, from, columns)
    }

    fn sum_squares(&mut self, sum: Tensor, x: Tensor) -> Result {
        self.compute("sum_squares", &[x], &[sum]).sum_squares(sum, x)
    }

    fn clip_scale(&mut self, scale: Tensor, sum: Tensor, max_norm: f64) -> Result {
        self.compute("clip_scale", &[sum], &[scale]).clip_scale(scale, sum, max_norm)
    }

    fn matmul(&mut self, y: Tensor, x: Tensor, w: Tensor, beta: f64) -> Result {
        self.compute("matmul", &[x, w], &[y]).matmul(y, x, w, beta)
    }

    fn matmul_dx(&mut self, dx: Tensor, dy: Tensor, w: Tensor, beta: f64) -> Result {
        self.compute("matmul_dx", &[dy, w], &[dx]).matmul_dx(dx, dy, w, beta)
    }

    fn matmul_dw(&mut self, dw: Tensor, dy: Tensor, x: Tensor) -> Result {
        self.compute("matmul_dw", &[dy, x], &[dw]).matmul_dw(dw, dy, x)
    }

    fn embedding(&mut self, x: Tensor, ids: Tensor, table: Tensor) -> Result {
        self.compute("embedding", &[ids, table], &[x]).embedding(x, ids, table)
    }

    fn embedding_backward(&mut self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result {
        self.compute("embedding_backward", &[ids, dx], &[dtable]).embedding_backward(dtable, ids, dx)
    }

    fn rmsnorm(&mut self, y: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.compute("rmsnorm", &[x, w], &[y]).rmsnorm(y, x, w, eps)
    }

    fn rmsnorm_backward(&mut self, dx: Tensor, dw: Tensor, dy: Tensor, x: Tensor, w: Tensor, eps: f64) -> Result {
        self.compute("rmsnorm_backward", &[dy, x, w], &[dx, dw]).rmsnorm_backward(dx, dw, dy, x, w, eps)
    }

    fn rope_table(&mut self, table: Tensor, positions: Tensor, frequencies: &[f64]) -> Result {
        self.compute("rope_table", &[positions], &[table]).rope_table(table, positions, frequencies)
    }

    fn rope_split(
        &mut self,
        q: Option<Tensor>,
        kv: Option<(Tensor, Tensor)>,
        qkv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        let made: Vec<Tensor> = q.into_iter().chain(kv.into_iter().flat_map(|(k, v)| [k, v])).collect();
        self.compute("rope_split", &[qkv, table], &made).rope_split(q, kv, qkv, table, heads)
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
        let b = self.compute("rope_merge_backward", &[dq, dk, dv, table], &[dqkv]);
        b.rope_merge_backward(dqkv, dq, dk, dv, table, heads)
    }

    fn attention(
        &mut self,
        o: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let b = self.compute("attention", &[q, seen(k, window), seen(v, window)], &[o, lse, workspace]);
        b.attention(o, lse, q, k, v, workspace, heads, window)
    }

    fn attention_backward(
        &mut self,
        grads: AttentionGrads,
        saved: AttentionSaved,
        workspace: Tensor,
        heads: Heads,
        window: &Window,
    ) -> Result {
        let AttentionSaved { d_o, o, lse, q, k, v } = saved;
        let reads = [d_o, o, lse, q, seen(k, window), seen(v, window)];
        let writes = [grads.dq, seen(grads.dk, window), seen(grads.dv, window), grads.delta, workspace];
        self.compute("attention_backward", &reads, &writes).attention_backward(grads, saved, workspace, heads, window)
    }

    fn swiglu(&mut self, act: Tensor, gate_up: Tensor) -> Result {
        self.compute("swiglu", &[gate_up], &[act]).swiglu(act, gate_up)
    }

    fn swiglu_backward(&mut self, gate_up: Tensor, dact: Tensor) -> Result {
        self.compute("swiglu_backward", &[dact], &[gate_up]).swiglu_backward(gate_up, dact)
    }

    fn cross_entropy(&mut self, sums: Tensor, logits: Tensor, labels: Tensor, gradient: Option<f64>) -> Result {
        self.compute("cross_entropy", &[labels], &[sums, logits]).cross_entropy(sums, logits, labels, gradient)
    }

    fn adamw(&mut self, state: OptimizerState, g: Tensor, scale: Tensor, hyper: &AdamW) -> Result {
        let written: Vec<Tensor> = [state.w, state.m, state.v].into_iter().chain(state.low).collect();
        self.compute("adamw", &[g, scale], &written).adamw(state, g, scale, hyper)
    }
}

/// Collectives on a backend that is watched.
pub struct WatchedComm<C>(pub C);

impl<B: Backend, C: Comm<B>> Comm<Watched<B>> for WatchedComm<C> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn n_ranks(&self) -> usize {
        self.0.n_ranks()
    }

    fn stream(&self) -> Stream {
        self.0.stream()
    }

    fn all_to_all(&mut self, b: &mut Watched<B>, to: &[Tensor], from: &[Tensor]) -> Result {
        self.0.all_to_all(b.on(self.0.stream(), "all_to_all", from, to), to, from)
    }

    fn all_gather(&mut self, b: &mut Watched<B>, to: Tensor, from: Tensor) -> Result {
        self.0.all_gather(b.on(self.0.stream(), "all_gather", &[from], &[to]), to, from)
    }

    fn reduce_scatter(&mut self, b: &mut Watched<B>, to: Tensor, from: Tensor) -> Result {
        self.0.reduce_scatter(b.on(self.0.stream(), "reduce_scatter", &[from], &[to]), to, from)
    }

    fn all_reduce(&mut self, b: &mut Watched<B>, x: Tensor) -> Result {
        self.0.all_reduce(b.on(self.0.stream(), "all_reduce", &[], &[x]), x)
    }

    fn broadcast(&mut self, b: &mut Watched<B>, x: Tensor, root: usize) -> Result {
        self.0.broadcast(b.on(self.0.stream(), "broadcast", &[], &[x]), x, root)
    }

    fn all_reduce_counts(&mut self, counts: &mut [u64]) -> Result {
        self.0.all_reduce_counts(counts)
    }

    fn barrier(&mut self, b: &mut Watched<B>) -> Result {
        b.join();
        self.0.barrier(&mut b.b)
    }

    fn split(&mut self, color: u64, key: u64) -> Result<Self> {
        self.0.split(color, key).map(Self)
    }

    fn abort(&self, cause: String) {
        self.0.abort(cause);
    }

    fn check(&self) -> Result {
        self.0.check()
    }
}
