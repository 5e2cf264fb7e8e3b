//! Moments and low halves in host memory, through the device a piece at a time.
//!
//! Memory: two pieces instead of 10 bytes a parameter (ALST, like ZeRO-Offload, arXiv 2101.06840, updates such states on the
//! host's cores; here they visit the device, whose update is the one and only). Price: every byte crosses the link once each
//! way, both ways at once, after the norm is known. Only the state of the first parameters may be there; the rest is resident
//! and updated while the first piece is on its way. Twin: `optim::update`. Test: `parity::optimizer_offload`.

use crate::engine::{
    Result,
    backend::{AdamW, Backend, Space, Split, Stream, Tensor},
    optim::{self, Group, States},
};

/// The room. State tensors are one column, a row a parameter.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerOffload {
    pub m: Split,
    pub v: Split,
    /// Low halves of the master weights; only with bf16 weights.
    pub low: Option<Split>,
    /// None when nothing is in host memory.
    pub staged: Option<[Staged; 2]>,
}

/// A buffer of one piece.
#[derive(Debug, Clone, Copy)]
pub struct Staged {
    /// Only with weights in host memory.
    pub w: Option<Tensor>,
    pub m: Tensor,
    pub v: Tensor,
    pub low: Option<Tensor>,
}

impl Staged {
    /// The buffer's first `n` parameters.
    fn first(self, n: u64) -> Self {
        let cut = |tensor: Tensor| tensor.rows(0, n);
        Self { w: self.w.map(cut), m: cut(self.m), v: cut(self.v), low: self.low.map(cut) }
    }

    /// Its tensors beside those of `home` that they hold.
    fn paired(self, home: Self) -> impl Iterator<Item = (Tensor, Tensor)> {
        let both = [self.w.zip(home.w), Some((self.m, home.m)), Some((self.v, home.v)), self.low.zip(home.low)];
        both.into_iter().flatten()
    }
}

impl OptimizerOffload {
    /// AdamW over all parameters `w`, a row a parameter, with gradients `g` times `scale`, flat. State of parameters in host
    /// memory must be there too.
    pub fn update<B: Backend>(
        &self,
        b: &mut B,
        (w, g): (Split, Tensor),
        groups: &[Group],
        scale: Tensor,
        hyper: &AdamW,
    ) -> Result {
        let hosted = self.m.host.rows;
        // The buffers lie over work that the gradients needed.
        let mut free = [b.record(Stream::Compute)?, b.record(Stream::Compute)?];
        if let Some(resident) = w.rows(hosted, w.n_rows()).next() {
            assert_eq!(hosted + resident.rows, w.n_rows(), "state of weights in host memory is there too");
            let states = States {
                w: resident.part(0, resident.rows),
                low: self.low.map(|low| low.device),
                m: self.m.device,
                v: self.v.device,
                g: g.part(hosted, resident.rows),
            };
            optim::update(b, &states, hosted, groups, scale, hyper)?;
        }
        let Some(buffers) = self.staged else { return Ok(()) };
        let mut first = 0;
        for (i, w) in pieces(w, hosted, buffers[0].m.rows).enumerate() {
            let n = w.rows;
            let (home, here) = (self.hosted(w, first), buffers[i % 2].first(n));
            b.wait(Stream::Up, &free[i % 2])?;
            for (to, from) in here.paired(home) {
                b.copy(Stream::Up, to, from)?;
            }
            let up = b.record(Stream::Up)?;
            b.wait(Stream::Compute, &up)?;
            let w = home.w.and(here.w).unwrap_or(w).part(0, n);
            let states = States { w, low: here.low, m: here.m, v: here.v, g: g.part(first, n) };
            optim::update(b, &states, first, groups, scale, hyper)?;
            let updated = b.record(Stream::Compute)?;
            b.wait(Stream::Down, &updated)?;
            for (from, to) in here.paired(home) {
                b.copy(Stream::Down, to, from)?;
            }
            free[i % 2] = b.record(Stream::Down)?;
            first += n;
        }
        // What comes next may overwrite the buffers.
        free.iter().try_for_each(|down| b.wait(Stream::Compute, down))
    }

    /// State in host memory of the parameters `w`, which start at `first`, and these themselves if they are there.
    fn hosted(&self, w: Tensor, first: u64) -> Staged {
        let cut = |split: Split| split.host.rows(first, first + w.rows);
        let w = (w.space == Space::Host).then_some(w);
        Staged { w, m: cut(self.m), v: cut(self.v), low: self.low.map(cut) }
    }
}

/// The first `n` rows in pieces of up to `size`, each in one place.
fn pieces(rows: Split, n: u64, size: u64) -> impl Iterator<Item = Tensor> {
    rows.rows(0, n).flat_map(move |place| {
        let starts = (0..place.rows).step_by(size as usize);
        starts.map(move |start| place.rows(start, place.rows.min(start + size)))
    })
}
