//! Final norm, head and cross entropy on any number of rows. The gradient is made in the forward pass.
//!
//! The result is a sum and a count, never a mean: the one division by the batch's number of valid labels is `gradient`.

use crate::engine::{
    Result,
    backend::{Backend, Tensor},
};

/// Weights, or where their gradients go.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// `[1, h]`
    pub norm: Tensor,
    /// `[V, h]`
    pub head: Tensor,
}

/// Buffers for t rows.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// `[t, h]`
    pub norm: Tensor,
    /// `[t, V]`
    pub logits: Tensor,
    /// `[t, h]`
    pub d_norm: Tensor,
}

/// What to do beside adding to the sums.
#[derive(Debug, Clone, Copy)]
pub struct Gradient {
    /// `[t, h]`: receives the gradient of x.
    pub dx: Tensor,
    pub dw: Weights,
    /// One over the number of valid labels of the whole step.
    pub scale: f64,
}

/// Loss of the rows of `x` `[t, h]` against labels `[t, 1]`, added to `sums` `[1, 2]`; with `gradient`, also backward.
pub fn forward_backward<B: Backend>(
    b: &mut B,
    sums: Tensor,
    (x, labels): (Tensor, Tensor),
    w: &Weights,
    work: &Work,
    gradient: Option<Gradient>,
    eps: f64,
) -> Result {
    b.rmsnorm(work.norm, x, w.norm, eps)?;
    b.matmul(work.logits, work.norm, w.head, 0.0)?;
    b.cross_entropy(sums, work.logits, labels, gradient.map(|g| g.scale))?;
    let Some(Gradient { dx, dw, .. }) = gradient else { return Ok(()) };
    b.matmul_dw(dw.head, work.logits, work.norm)?;
    b.matmul_dx(work.d_norm, work.logits, w.head, 0.0)?;
    b.fill(dx, 0.0)?;
    b.rmsnorm_backward(dx, dw.norm, work.d_norm, x, w.norm, eps)
}
