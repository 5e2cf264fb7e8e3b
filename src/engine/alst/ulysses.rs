//! Attention of a sequence that several ranks share (Ulysses, arXiv 2309.14509; ALST section 3.1): every rank has its rows of
//! each chunk with all heads, and for attention gets the whole chunk with its own heads.
//!
//! Memory: keys and values of a rank's heads only, and activations of its rows only. Price: q, k, v, o and their gradients cross
//! between ranks, each once; a rank gets the kv heads that its queries use, once, and gradients of heads that ranks share are
//! added in the wide type. A chunk is cut in as many equal pieces as there are ranks, so the exchange of a chunk brings all of
//! its rows in order and every rank has the same work.
//!
//! An exchange is sent on a stream of its own and waited for where what arrives is used ([`UnderWay`]), so that other chunks are worked
//! on meanwhile; `model::pipeline` has the order of the steps. Why no buffer is written too early: an exchange begins behind
//! everything that the compute stream was given before it, and ends before the next one begins. So all that can go wrong is that an
//! operation given to the compute stream between an exchange and the wait for it touches what that exchange reads or writes; each
//! function says what it leaves to an exchange. With one rank it is `layers::attention`, step by step. Tests: `parity::ranks`,
//! `parity::streams`.

use std::collections::VecDeque;

use crate::{
    domain::heads::HeadRun,
    engine::{
        Result,
        backend::{AttentionGrads, AttentionSaved, Backend, Heads, Stream, Tensor},
        comm::{self, Comm},
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

/// Buffers for the n rows that a rank has of a chunk, with all heads. But for `packed` only the compute stream touches them.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    /// `[n, nq d]`: queries, or a gradient: of attention's output, then of the queries.
    pub q: Tensor,
    /// `[n, nq d]`: attention output.
    pub o: Tensor,
    /// `[n, nk d]`, and their gradients, wide.
    pub kv: KeysValues,
    pub dkv: KeysValues,
    /// Bytes: blocks of columns that leave or have come.
    pub packed: Tensor,
}

/// `packed`, cut for exchanges that are under way at once. A forward has outputs of two chunks under way and what is projected,
/// a backward the first room for outputs, or their gradient, then queries where a forward has all that is projected, and behind these
/// the gradients of all three.
struct Packed {
    outputs: [Tensor; 2],
    projected: Tensor,
    grads: Tensor,
}

/// Exchanges under way, oldest first, by what the compute stream must wait for before it uses what they bring, or writes again
/// what they take. None with one rank.
#[derive(Debug)]
pub struct UnderWay<E> {
    projected: VecDeque<E>,
    outputs: VecDeque<E>,
    d_outputs: VecDeque<E>,
    grads: VecDeque<E>,
}

impl<E> Default for UnderWay<E> {
    fn default() -> Self {
        let none = VecDeque::new;
        Self { projected: none(), outputs: none(), d_outputs: none(), grads: none() }
    }
}

/// One call of `all_to_all`.
struct Parcels {
    to: Vec<Tensor>,
    from: Vec<Tensor>,
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
    /// True when steps exchange heads, and other chunks are worked on meanwhile.
    pub fn exchanges(&self) -> bool {
        self.exchange.is_some()
    }

    /// Projects and rotates a chunk's rows: the rank's heads of the chunk's queries into `q` `[c, hq d]`, if wanted, and their
    /// rows of keys and values into `kv` `[T, hk d]`. They are there after [`Self::projected`].
    pub fn project<B: Backend, C: Comm<B>>(
        &self,
        (b, comm, under_way): (&mut B, &mut C, &mut UnderWay<B::Event>),
        x: Tensor,
        w: &Weights,
        work: &attention::Work,
        (q, kv): (Option<Tensor>, Option<KeysValues>),
        at: &Chunk,
    ) -> Result {
        let Some(exchange) = self.exchange else {
            return attention::project(b, x, w, work, (q, kv.map(|kv| kv.rows(&at.rows))), at);
        };
        let (local, mut room) = (exchange.first(at.n_local()), exchange.packed().projected);
        attention::project(b, x, w, work, (q.map(|_| local.q), kv.map(|_| local.kv)), at)?;
        // Blocks of the chunk before may still be leaving from there.
        if let Some(before) = under_way.projected.back() {
            b.wait(Stream::Compute, before)?;
        }
        let mut parcels = Vec::new();
        if let Some(q) = q {
            parcels.extend(self.pack(b, Kind::Queries, local.q, &mut room, |i| self.of_chunk(q, i, at))?);
        }
        if let Some(kv) = kv {
            for (whole, local) in [(kv.k, local.kv.k), (kv.v, local.kv.v)] {
                parcels.extend(self.pack(b, Kind::Keys, local, &mut room, |i| self.of_sequence(whole, i, at))?);
            }
        }
        under_way.projected.push_back(send((b, comm), &parcels)?);
        Ok(())
    }

    /// What the oldest call of [`Self::project`] sent is there.
    pub fn projected<B: Backend>(&self, b: &mut B, under_way: &mut UnderWay<B::Event>) -> Result {
        arrived(b, &mut under_way.projected)
    }

    /// What all of them sent is there.
    pub fn all_projected<B: Backend>(&self, b: &mut B, under_way: &mut UnderWay<B::Event>) -> Result {
        under_way.projected.drain(..).next_back().map_or(Ok(()), |last| b.wait(Stream::Compute, &last))
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

    /// Sends attention's output, of which `o` must stay until [`Self::outputs`]. Forwards take `turn` 0 and 1 by turns.
    pub fn send_outputs<B: Backend, C: Comm<B>>(
        &self,
        (b, comm, under_way): (&mut B, &mut C, &mut UnderWay<B::Event>),
        o: Tensor,
        turn: usize,
        at: &Chunk,
    ) -> Result {
        let Some(exchange) = self.exchange else { return Ok(()) };
        let (local, mut room) = (exchange.first(at.n_local()).o, exchange.packed().outputs[turn]);
        let parcels = self.back(Kind::Queries, local, &mut room, |i| self.of_chunk(o, i, at));
        under_way.outputs.push_back(send((b, comm), &parcels)?);
        Ok(())
    }

    /// The rank's rows `[n, nq d]` of attention's output, with all heads.
    pub fn outputs<B: Backend>(
        &self,
        (b, under_way): (&mut B, &mut UnderWay<B::Event>),
        o: Tensor,
        turn: usize,
        at: &Chunk,
    ) -> Result<Tensor> {
        let Some(exchange) = self.exchange else { return Ok(o) };
        let (local, mut room) = (exchange.first(at.n_local()).o, exchange.packed().outputs[turn]);
        arrived(b, &mut under_way.outputs)?;
        self.unpack(b, Kind::Queries, local, &mut room)?;
        Ok(local)
    }

    /// First step of backward: from `dy` `[n, h]`, the gradient of `x + output(o)`, the output's gradient, which is sent to
    /// `work.d_o`, and the weights'. `o` is that of [`Self::outputs`], of turn 0.
    pub fn backward_output<B: Backend, C: Comm<B>>(
        &self,
        (b, comm, under_way): (&mut B, &mut C, &mut UnderWay<B::Event>),
        (dy, o): (Tensor, Tensor),
        (w, dw): (&Weights, &Weights),
        work: &attention::Work,
        at: &Chunk,
    ) -> Result {
        if let Some(exchange) = self.exchange {
            // The outputs have been taken out of the room, and the gradient before has left from it.
            let (d_o, mut room) = (exchange.first(at.n_local()).q, exchange.packed().outputs[0]);
            attention::backward_output(b, d_o, dy, w)?;
            let parcels = self.pack(b, Kind::Queries, d_o, &mut room, |i| self.of_chunk(work.d_o, i, at))?;
            under_way.d_outputs.push_back(send((b, comm), &parcels)?);
        } else {
            attention::backward_output(b, work.d_o, dy, w)?;
        }
        attention::backward_output_weights(b, dw, dy, o)
    }

    /// Second step: through attention. Sends the gradients of queries, of which `work.dq` must stay until the third step, and
    /// of the chunk's own keys and values, whose rows of `dkv` (wide, added to) are complete, because only queries of this and later
    /// chunks see them and those went before.
    pub fn backward_attend<B: Backend, C: Comm<B>>(
        &self,
        (b, comm, under_way): (&mut B, &mut C, &mut UnderWay<B::Event>),
        (act, kv): (&Activations, KeysValues),
        dkv: KeysValues,
        work: &attention::Work,
        at: &Chunk,
    ) -> Result {
        arrived(b, &mut under_way.d_outputs)?;
        for i in 0..self.own().len() {
            let Run { heads, act: Activations { q, o, lse }, kv } = self.run(i, act, kv, at);
            let there = Activations { q: work.dq, o: work.d_o, lse: work.delta };
            let Run { act: Activations { q: dq, o: d_o, lse: delta }, kv: dkv, .. } = self.run(i, &there, dkv, at);
            let saved = AttentionSaved { d_o, o, lse, q, k: kv.k, v: kv.v };
            let grads = AttentionGrads { dq, dk: dkv.k, dv: dkv.v, delta };
            attention::backward_attend(b, grads, saved, work, heads, at)?;
        }
        let Some(exchange) = self.exchange else { return Ok(()) };
        let (local, mut room) = (exchange.first(at.n_local()), exchange.packed().grads);
        let mut parcels = self.back(Kind::Queries, local.q, &mut room, |i| self.of_chunk(work.dq, i, at));
        for (local, whole) in [(local.dkv.k, dkv.k), (local.dkv.v, dkv.v)] {
            parcels.extend(self.back(Kind::Keys, local, &mut room, |i| self.of_sequence(whole, i, at)));
        }
        under_way.grads.push_back(send((b, comm), &parcels)?);
        Ok(())
    }

    /// Third step: `dy` becomes the gradient of `x`. `work.norm` holds the normed input.
    pub fn backward_projection<B: Backend>(
        &self,
        (b, under_way): (&mut B, &mut UnderWay<B::Event>),
        dy: Tensor,
        (x, w): (Tensor, &Weights),
        dkv: KeysValues,
        dw: &Weights,
        work: &attention::Work,
        at: &Chunk,
    ) -> Result {
        let (mut dq, mut dkv) = (work.dq, dkv.rows(&at.rows));
        if let Some(exchange) = self.exchange {
            let (local, mut room) = (exchange.first(at.n_local()), exchange.packed().grads);
            (dq, dkv) = (local.q, local.dkv);
            arrived(b, &mut under_way.grads)?;
            self.unpack(b, Kind::Queries, dq, &mut room)?;
            self.unpack(b, Kind::Keys, dkv.k, &mut room)?;
            self.unpack(b, Kind::Keys, dkv.v, &mut room)?;
        }
        attention::backward_projection(b, dy, (x, w), (dq, dkv), dw, work, at)
    }

    /// Every rank's rows `[n, all heads]` of `local`, packed in `room`, for the ranks that have their heads: `to` gives the chunk's
    /// rows `[c, its heads]` of each of this rank's runs.
    fn pack<B: Backend>(
        &self,
        b: &mut B,
        kind: Kind,
        local: Tensor,
        room: &mut Tensor,
        to: impl Fn(usize) -> Tensor,
    ) -> Result<Vec<Parcels>> {
        let mut parcels = Vec::new();
        for (i, blocks) in self.blocks(kind, local, room).into_iter().enumerate() {
            for (block, first) in &blocks {
                b.copy_columns((*block, 0), (local, *first), block.cols)?;
            }
            let from = blocks.into_iter().map(|(block, _)| block).collect();
            parcels.push(Parcels { to: self.pieces(i, local, &to), from });
        }
        Ok(parcels)
    }

    /// The way back: of each run the chunk's rows `[c, its heads]` that `from` gives, to every rank its rows, in `room`.
    fn back(&self, kind: Kind, local: Tensor, room: &mut Tensor, from: impl Fn(usize) -> Tensor) -> Vec<Parcels> {
        let parcels = |(i, blocks): (usize, Vec<(Tensor, u64)>)| {
            let to = blocks.into_iter().map(|(block, _)| block).collect();
            Parcels { to, from: self.pieces(i, local, &from) }
        };
        self.blocks(kind, local, room).into_iter().enumerate().map(parcels).collect()
    }

    /// What came back, from `room` to the rank's rows with all heads. Keys that several ranks have are added up.
    fn unpack<B: Backend>(&self, b: &mut B, kind: Kind, local: Tensor, room: &mut Tensor) -> Result {
        if kind == Kind::Keys {
            b.fill(local, 0.0)?;
        }
        for (block, first) in self.blocks(kind, local, room).into_iter().flatten() {
            match kind {
                Kind::Queries => b.copy_columns((local, first), (block, 0), block.cols)?,
                Kind::Keys => b.add_columns((local, first), (block, 0), block.cols)?,
            }
        }
        Ok(())
    }

    /// Where the columns of each run of each rank lie packed, one block behind the other with as many rows as `local` and of its
    /// type; and the first of these columns among all heads. Taken from the front of `room`, which is bytes.
    fn blocks(&self, kind: Kind, local: Tensor, room: &mut Tensor) -> Vec<Vec<(Tensor, u64)>> {
        let mut block = |runs: &Vec<HeadRun>, i| {
            let (first, cols) = self.columns(runs.get(i), kind);
            let block = Tensor { dtype: local.dtype, rows: local.rows, cols, ..*room };
            *room = behind(*room, block.bytes());
            (block, first)
        };
        (0..self.most_runs()).map(|i| self.heads.iter().map(|runs| block(runs, i)).collect()).collect()
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

    /// The plan's room is three times the columns of `q`, and keys twice in the wide type: for a backward all of it, more than a
    /// forward needs, whose keys are in storage.
    fn packed(self) -> Packed {
        let (all, q) = (self.packed, self.q.bytes());
        let projected = behind(all, q);
        let up_to_last = projected.bytes() - q;
        Packed {
            outputs: [all, behind(projected, up_to_last)],
            projected: Tensor { cols: up_to_last / all.dtype.bytes(), ..projected },
            grads: behind(projected, q),
        }
    }
}

/// What of `room` lies behind its first bytes.
///
/// # Panics
/// When it has not so many: the plan's room is that of the largest chunk.
fn behind(room: Tensor, bytes: u64) -> Tensor {
    let n = bytes / room.dtype.bytes();
    room.part(n, room.elements() - n)
}

/// Queues exchanges behind everything on the compute stream so far.
fn send<B: Backend, C: Comm<B>>((b, comm): (&mut B, &mut C), parcels: &[Parcels]) -> Result<B::Event> {
    comm::queue((b, comm), |b, comm| {
        parcels.iter().try_for_each(|parcels| comm.all_to_all(b, &parcels.to, &parcels.from))
    })
}

/// Lets the compute stream wait for the oldest exchange of its kind.
fn arrived<B: Backend>(b: &mut B, under_way: &mut VecDeque<B::Event>) -> Result {
    under_way.pop_front().map_or(Ok(()), |done| b.wait(Stream::Compute, &done))
}
