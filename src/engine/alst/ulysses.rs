//! Attention of a sequence that several ranks share (Ulysses, arXiv 2309.14509; ALST section 3.1): every rank has its rows of
//! each chunk with all heads, and for attention gets the whole chunk with its own heads.
//!
//! Memory: keys and values of a rank's heads only, and activations of its rows only. Price: q, k, v, o and their gradients cross
//! between ranks, each once; a rank gets the kv heads that its queries use, once, and gradients of heads that ranks share are
//! added in the wide type. A chunk is cut in as many equal pieces as there are ranks, so the exchange of a chunk brings all of
//! its rows in order and every rank has the same work. With one rank it is `layers::attention`. Test: `parity::ulysses`.

use crate::{
    domain::heads::HeadRun,
    engine::{
        Result,
        backend::{AttentionGrads, AttentionSaved, Backend, Heads, Tensor},
        comm::{Comm, in_turn},
        layers::attention::{self, Activations, Chunk, KeysValues, Weights},
    },
};

/// The room.
#[derive(Debug, Clone)]
pub struct Ulysses {
    /// Of the model.
    pub head_dim: u64,
    /// Heads of every rank.
    pub heads: Vec<Vec<HeadRun>>,
    /// This one.
    pub rank: usize,
    /// Only with several ranks.
    pub exchange: Option<Exchange>,
}

/// Buffers for the n rows that a rank has of a chunk, with all heads.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    /// `[n, nq d]`: queries, then their gradient; attention output, then its gradient.
    pub q: Tensor,
    pub o: Tensor,
    /// `[n, nk d]`, and their gradients, wide.
    pub kv: KeysValues,
    pub dkv: KeysValues,
    /// Bytes: blocks of columns that leave or have come.
    pub packed: Tensor,
}

/// What backward of a chunk reads.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The rank's rows of the layer's input, and of attention's output.
    pub x: Tensor,
    pub o: Tensor,
    pub w: &'a Weights,
    pub act: Activations,
    pub kv: KeysValues,
}

/// Queries or keys: which of a run's heads an exchange moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Queries,
    Keys,
}

impl Kind {
    /// First head and number of heads.
    fn of(self, run: &HeadRun) -> (u64, u64) {
        match self {
            Self::Queries => (run.heads.start, run.n_heads()),
            Self::Keys => (run.kv_heads.start, run.n_kv_heads()),
        }
    }
}

/// A rank's buffers cut to one run of its heads.
struct Run {
    heads: Heads,
    act: Activations,
    kv: KeysValues,
}

impl Ulysses {
    /// Projects and rotates a chunk's rows: the rank's heads of the chunk's queries into `q` `[c, hq d]`, if wanted, and their
    /// rows of keys and values into `kv` `[T, hk d]`.
    pub fn project<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        x: Tensor,
        w: &Weights,
        work: &attention::Work,
        (q, kv): (Option<Tensor>, Option<KeysValues>),
        at: &Chunk,
    ) -> Result {
        let Some(exchange) = self.exchange.map(|exchange| exchange.first(at.n_local())) else {
            return attention::project(b, x, w, work, (q, kv.map(|kv| kv.rows(&at.rows))), at);
        };
        let local = (q.map(|_| exchange.q), kv.map(|_| exchange.kv));
        attention::project(b, x, w, work, (local.0, local.1), at)?;
        if let Some(q) = q {
            self.to_heads((b, comm), Kind::Queries, exchange.q, exchange.packed, |i| self.of_chunk(q, i, at))?;
        }
        if let Some(kv) = kv {
            for (whole, local) in [(kv.k, exchange.kv.k), (kv.v, exchange.kv.v)] {
                self.to_heads((b, comm), Kind::Keys, local, exchange.packed, |i| self.of_sequence(whole, i, at))?;
            }
        }
        Ok(())
    }

    /// Attends the chunk's queries, with the rank's heads, to all keys up to the chunk's end.
    pub fn attend<B: Backend>(
        &self,
        b: &mut B,
        act: &Activations,
        kv: KeysValues,
        work: &attention::Work,
        at: &Chunk,
    ) -> Result {
        (0..self.own().len()).try_for_each(|i| {
            let run = self.run(i, act, kv, at);
            attention::attend(b, &run.act, run.kv, work, run.heads, at)
        })
    }

    /// Makes the backend ready for the chunk's attention, forward and backward.
    pub fn prepare<B: Backend>(&self, b: &mut B, at: &Chunk) -> Result {
        (0..self.own().len()).try_for_each(|i| attention::prepare(b, self.heads_of(i), at))
    }

    /// The rank's rows `[n, nq d]` of attention's output, with all heads.
    pub fn outputs<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        o: Tensor,
        at: &Chunk,
    ) -> Result<Tensor> {
        let Some(exchange) = self.exchange.map(|exchange| exchange.first(at.n_local())) else { return Ok(o) };
        self.to_rows((b, comm), Kind::Queries, exchange.o, exchange.packed, |i| self.of_chunk(o, i, at))?;
        Ok(exchange.o)
    }

    /// Backward of a chunk: `dy` `[n, h]`, the gradient of `x + output(o)`, becomes that of `x`. `work.norm` holds the normed
    /// input. `dkv` (wide) is added to; the chunk's own rows of it are complete after this, because only queries of this and
    /// later chunks see them and those went before.
    pub fn backward<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        dy: Tensor,
        saved: Saved,
        dkv: KeysValues,
        dw: &Weights,
        work: &attention::Work,
        at: &Chunk,
    ) -> Result {
        let Saved { x, o, w, act, kv } = saved;
        let exchange = self.exchange.map(|exchange| exchange.first(at.n_local()));
        // The output's gradient may take its place: the weights' gradient has read it by then.
        let d_o = exchange.map_or(work.d_o, |exchange| exchange.o);
        attention::backward_output(b, d_o, dy, o, w, dw)?;
        if let Some(exchange) = exchange {
            self.to_heads((b, comm), Kind::Queries, d_o, exchange.packed, |i| self.of_chunk(work.d_o, i, at))?;
        }
        for i in 0..self.own().len() {
            let Run { heads, act: Activations { q, o, lse }, kv } = self.run(i, &act, kv, at);
            let there = Activations { q: work.dq, o: work.d_o, lse: work.delta };
            let Run { act: Activations { q: dq, o: d_o, lse: delta }, kv: dkv, .. } = self.run(i, &there, dkv, at);
            let saved = AttentionSaved { d_o, o, lse, q, k: kv.k, v: kv.v };
            let grads = AttentionGrads { dq, dk: dkv.k, dv: dkv.v, delta };
            attention::backward_attend(b, grads, saved, work, heads, at)?;
        }
        let (dq, dkv) = if let Some(exchange) = exchange {
            self.to_rows((b, comm), Kind::Queries, exchange.q, exchange.packed, |i| self.of_chunk(work.dq, i, at))?;
            for (local, whole) in [(exchange.dkv.k, dkv.k), (exchange.dkv.v, dkv.v)] {
                self.to_rows((b, comm), Kind::Keys, local, exchange.packed, |i| self.of_sequence(whole, i, at))?;
            }
            (exchange.q, exchange.dkv)
        } else {
            (work.dq, dkv.rows(&at.rows))
        };
        attention::backward_projection(b, dy, (x, w), (dq, dkv), dw, work, at)
    }

    /// Every rank's rows `[n, all heads]` of `local` to the ranks that have their heads: `to` gives the chunk's rows
    /// `[c, its heads]` of each of this rank's runs.
    fn to_heads<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        kind: Kind,
        local: Tensor,
        packed: Tensor,
        to: impl Fn(usize) -> Tensor,
    ) -> Result {
        for i in 0..self.most_runs() {
            let blocks = self.blocks(i, kind, local, packed);
            for (block, first) in &blocks {
                b.copy_columns((*block, 0), (local, *first), block.cols)?;
            }
            let leaving: Vec<Tensor> = blocks.into_iter().map(|(block, _)| block).collect();
            let arriving = self.pieces(i, local, &to);
            in_turn((b, comm), |b, comm| comm.all_to_all(b, &arriving, &leaving))?;
        }
        Ok(())
    }

    /// The way back: of each run the chunk's rows `[c, its heads]` that `from` gives, to every rank its rows, in `local` with
    /// all heads. Keys that several ranks have are added up.
    fn to_rows<B: Backend, C: Comm<B>>(
        &self,
        (b, comm): (&mut B, &mut C),
        kind: Kind,
        local: Tensor,
        packed: Tensor,
        from: impl Fn(usize) -> Tensor,
    ) -> Result {
        if kind == Kind::Keys {
            b.fill(local, 0.0)?;
        }
        for i in 0..self.most_runs() {
            let blocks = self.blocks(i, kind, local, packed);
            let arriving: Vec<Tensor> = blocks.iter().map(|(block, _)| *block).collect();
            let leaving = self.pieces(i, local, &from);
            in_turn((b, comm), |b, comm| comm.all_to_all(b, &arriving, &leaving))?;
            for (block, first) in blocks {
                match kind {
                    Kind::Queries => b.copy_columns((local, first), (block, 0), block.cols)?,
                    Kind::Keys => b.add_columns((local, first), (block, 0), block.cols)?,
                }
            }
        }
        Ok(())
    }

    /// Where the columns of each rank's run `i` lie packed, one block behind the other with as many rows as `local` and of its
    /// type; and the first of these columns among all heads.
    fn blocks(&self, i: usize, kind: Kind, local: Tensor, packed: Tensor) -> Vec<(Tensor, u64)> {
        let elements = packed.bytes() / local.dtype.bytes();
        let scratch = Tensor { dtype: local.dtype, rows: 1, cols: elements, ..packed };
        let mut taken = 0;
        let block = |runs: &Vec<HeadRun>| {
            let (first, columns) = self.columns(runs.get(i), kind);
            let n = local.rows * columns;
            taken += n;
            (scratch.part(taken - n, n).shaped(local.rows, columns), first)
        };
        self.heads.iter().map(block).collect()
    }

    /// Every rank's piece of a run's rows, in order; nothing where this rank has no such run.
    fn pieces(&self, i: usize, local: Tensor, chunk: impl Fn(usize) -> Tensor) -> Vec<Tensor> {
        let whole = if i < self.own().len() { chunk(i) } else { local.shaped(local.rows * self.heads.len() as u64, 0) };
        (0..self.heads.len() as u64).map(|rank| whole.rows(rank * local.rows, (rank + 1) * local.rows)).collect()
    }

    fn own(&self) -> &[HeadRun] {
        &self.heads[self.rank]
    }

    fn most_runs(&self) -> usize {
        self.heads.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// First column and number of columns of a run's heads among all heads.
    fn columns(&self, run: Option<&HeadRun>, kind: Kind) -> (u64, u64) {
        let (first, n) = run.map_or((0, 0), |run| kind.of(run));
        (first * self.head_dim, n * self.head_dim)
    }

    /// Run `i` as attention knows it.
    fn heads_of(&self, i: usize) -> Heads {
        let run = &self.own()[i];
        Heads { n_heads: run.n_heads(), n_kv_heads: run.n_kv_heads(), head_dim: self.head_dim }
    }

    fn run(&self, i: usize, act: &Activations, kv: KeysValues, at: &Chunk) -> Run {
        let first: u64 = self.own()[..i].iter().map(HeadRun::n_heads).sum();
        let (q, o) = (self.of_chunk(act.q, i, at), self.of_chunk(act.o, i, at));
        let lse = act.lse.rows(first, first + self.own()[i].n_heads());
        let kv = KeysValues { k: self.keys(kv.k, i), v: self.keys(kv.v, i) };
        Run { heads: self.heads_of(i), act: Activations { q, o, lse }, kv }
    }

    /// Run `i` of a chunk's rows `[c, hq d]`, whose runs lie one behind the other: `[c, its heads]`.
    fn of_chunk(&self, x: Tensor, i: usize, at: &Chunk) -> Tensor {
        let n_rows = at.rows.end - at.rows.start;
        let before: u64 = self.own()[..i].iter().map(HeadRun::n_heads).sum();
        let columns = self.own()[i].n_heads() * self.head_dim;
        x.part(n_rows * before * self.head_dim, n_rows * columns).shaped(n_rows, columns)
    }

    /// Run `i` of keys or values `[T, hk d]` of the whole sequence, likewise: `[T, its heads]`.
    fn keys(&self, x: Tensor, i: usize) -> Tensor {
        let before: u64 = self.own()[..i].iter().map(HeadRun::n_kv_heads).sum();
        let columns = self.own()[i].n_kv_heads() * self.head_dim;
        x.part(x.rows * before * self.head_dim, x.rows * columns).shaped(x.rows, columns)
    }

    fn of_sequence(&self, x: Tensor, i: usize, at: &Chunk) -> Tensor {
        self.keys(x, i).rows(at.rows.start, at.rows.end)
    }
}

impl Exchange {
    /// The buffers' first `n` rows.
    fn first(self, n: u64) -> Self {
        let cut = |x: Tensor| x.rows(0, n);
        let both = |kv: KeysValues| KeysValues { k: cut(kv.k), v: cut(kv.v) };
        Self { q: cut(self.q), o: cut(self.o), kv: both(self.kv), dkv: both(self.dkv), packed: self.packed }
    }
}
