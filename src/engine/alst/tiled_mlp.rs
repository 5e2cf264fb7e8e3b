//! Feed-forward over row tiles (ALST section 3.3): only one tile's gate, up and activation exist at a time.
//!
//! Memory: `3 f + 2 h` elements a tile row, whatever the chunk. Price: none in arithmetic, since rows are independent;
//! weight gradients are summed over tiles in the wide type. Twin: `layers::mlp`. Test: `parity::tiled_mlp`.

use crate::engine::{
    Result,
    backend::{Backend, Tensor},
    layers::mlp::{self, GateUp, Saved, Weights, Work},
};

/// The room: tile buffers, and rows of gate and up that were kept instead.
#[derive(Debug, Clone, Copy)]
pub struct TiledMlp {
    /// Buffers of one tile; their row count is the tile size.
    pub work: Work,
    pub eps: f64,
}

/// Gate and up of the rows at hand, when they are kept rather than recomputed.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    /// `[rows, 2 f]`
    pub gate_up: Tensor,
    /// Whether an earlier forward has filled it.
    pub filled: bool,
}

impl TiledMlp {
    /// Forward over the rows of `x`, in place.
    pub fn forward<B: Backend>(&self, b: &mut B, x: Tensor, w: &Weights, kept: Option<Kept>) -> Result {
        for (start, end) in self.tiles(x.rows) {
            let (work, gate_up) = self.tile(start, end, kept);
            mlp::forward(b, x.rows(start, end), w, &work, gate_up, self.eps)?;
        }
        Ok(())
    }

    /// Backward over the rows of `x`; `dy` becomes the gradient of `x`.
    pub fn backward<B: Backend>(
        &self,
        b: &mut B,
        dy: Tensor,
        x: Tensor,
        w: &Weights,
        dw: &Weights,
        kept: Option<Kept>,
    ) -> Result {
        for (start, end) in self.tiles(x.rows) {
            let (work, gate_up) = self.tile(start, end, kept);
            let saved = Saved { x: x.rows(start, end), w, gate_up };
            mlp::backward(b, dy.rows(start, end), saved, dw, &work, self.eps)?;
        }
        Ok(())
    }

    fn tiles(&self, rows: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let tile = self.work.norm.rows;
        (0..rows.div_ceil(tile)).map(move |i| (i * tile, rows.min((i + 1) * tile)))
    }

    /// Buffers cut to rows `start..end`, with gate and up taken from what is kept.
    fn tile(&self, start: u64, end: u64, kept: Option<Kept>) -> (Work, GateUp) {
        let n = end - start;
        let gate_up = kept.map_or_else(|| self.work.gate_up.rows(0, n), |kept| kept.gate_up.rows(start, end));
        let work = Work {
            norm: self.work.norm.rows(0, n),
            gate_up,
            act: self.work.act.rows(0, n),
            d_norm: self.work.d_norm.rows(0, n),
        };
        (work, if kept.is_some_and(|kept| kept.filled) { GateUp::Kept } else { GateUp::Compute })
    }
}
