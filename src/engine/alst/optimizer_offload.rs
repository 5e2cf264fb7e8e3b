//! Moments and low halves in host memory, through the device a piece at a time.
//!
//! Memory: two pieces instead of 10 bytes a parameter (ALST, like ZeRO-Offload, arXiv 2101.06840, updates such states on the
//! host's cores; here they visit the device, whose update is the one and only). Price: every byte crosses the link once each
//! way, both ways at once, after the norm is known. Only the state of the first parameters may be there; the rest is resident
//! and updated while the first piece is on its way. Twin: `optim::update`. Test: `parity::optimizer_offload`.

use crate::engine::{
    Result,
    backend::{AdamW, Backend, Split, Stream, Tensor},
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
    pub m: Tensor,
    pub v: Tensor,
    pub low: Option<Tensor>,
}

impl Staged {
    /// The buffer's first `n` parameters.
    fn first(self, n: u64) -> Self {
        let cut = |tensor: Tensor| tensor.rows(0, n);
        Self { m: cut(self.m), v: cut(self.v), low: self.low.map(cut) }
    }

    fn tensors(self) -> impl Iterator<Item = Tensor> {
        [Some(self.m), Some(self.v), self.low].into_iter().flatten()
    }
}

impl OptimizerOffload {
    /// AdamW over all parameters `w` with gradients `g` times `scale`, both flat.
    pub fn update<B: Backend>(
        &self,
        b: &mut B,
        (w, g): (Tensor, Tensor),
        groups: &[Group],
        scale: Tensor,
        hyper: &AdamW,
    ) -> Result {
        let hosted = self.m.host.rows;
        // The buffers lie over work that the gradients needed.
        let mut free = [b.record(Stream::Compute)?, b.record(Stream::Compute)?];
        let rest = w.elements() - hosted;
        let resident = States {
            w: w.part(hosted, rest),
            low: self.low.map(|low| low.device),
            m: self.m.device,
            v: self.v.device,
            g: g.part(hosted, rest),
        };
        optim::update(b, &resident, hosted, groups, scale, hyper)?;
        let Some(buffers) = self.staged else { return Ok(()) };
        let size = buffers[0].m.rows;
        for (i, first) in (0..hosted).step_by(size as usize).enumerate() {
            let n = size.min(hosted - first);
            let (home, here) = (self.hosted(first, n), buffers[i % 2].first(n));
            b.wait(Stream::Up, &free[i % 2])?;
            for (to, from) in here.tensors().zip(home.tensors()) {
                b.copy(Stream::Up, to, from)?;
            }
            let up = b.record(Stream::Up)?;
            b.wait(Stream::Compute, &up)?;
            let states = States { w: w.part(first, n), low: here.low, m: here.m, v: here.v, g: g.part(first, n) };
            optim::update(b, &states, first, groups, scale, hyper)?;
            let updated = b.record(Stream::Compute)?;
            b.wait(Stream::Down, &updated)?;
            for (to, from) in home.tensors().zip(here.tensors()) {
                b.copy(Stream::Down, to, from)?;
            }
            free[i % 2] = b.record(Stream::Down)?;
        }
        // What comes next may overwrite the buffers.
        free.iter().try_for_each(|down| b.wait(Stream::Compute, down))
    }

    /// State of `n` parameters in host memory, as pieces of the whole.
    fn hosted(&self, first: u64, n: u64) -> Staged {
        let cut = |split: Split| split.host.rows(first, first + n);
        Staged { m: cut(self.m), v: cut(self.v), low: self.low.map(cut) }
    }
}
