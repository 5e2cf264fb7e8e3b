//! Head and cross entropy over row tiles (ALST section 3.1): logits of the whole sequence never exist.
//!
//! Memory: `V + 2 h` elements a tile row instead of a sequence row. Price: none; the gradient of a tile is made while its
//! logits are there, so the head runs once. Twin: `layers::loss`. Test: `parity::tiled_loss`.

use crate::engine::{
    Result,
    backend::{Backend, Tensor},
    layers::loss::{self, Gradient, Weights, Work},
};

/// The room: buffers of one tile, whose row count is the tile size.
#[derive(Debug, Clone, Copy)]
pub struct TiledLoss {
    pub work: Work,
    pub eps: f64,
}

impl TiledLoss {
    /// Loss of the rows of `x` against `labels`, added to `sums`; with `gradient`, also its gradients.
    pub fn forward_backward<B: Backend>(
        &self,
        b: &mut B,
        sums: Tensor,
        (x, labels): (Tensor, Tensor),
        w: &Weights,
        gradient: Option<Gradient>,
    ) -> Result {
        let tile = self.work.norm.rows;
        for start in (0..x.rows).step_by(tile as usize) {
            let end = x.rows.min(start + tile);
            let n = end - start;
            let work = Work {
                norm: self.work.norm.rows(0, n),
                logits: self.work.logits.rows(0, n),
                d_norm: self.work.d_norm.rows(0, n),
            };
            let gradient = gradient.map(|g| Gradient { dx: g.dx.rows(start, end), ..g });
            let rows = (x.rows(start, end), labels.rows(start, end));
            loss::forward_backward(b, sums, rows, w, &work, gradient, self.eps)?;
        }
        Ok(())
    }
}
