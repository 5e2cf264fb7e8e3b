//! Feed-forward: `x += down(silu(gate(norm(x))) * up(norm(x)))`, on any number of rows at once.

use crate::engine::{
    Result,
    backend::{Backend, Tensor},
};

/// Weights, or where their gradients go.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// `[1, h]`
    pub norm: Tensor,
    /// `[2 f, h]`
    pub gate_up: Tensor,
    /// `[h, f]`
    pub down: Tensor,
}

/// Buffers for t rows.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// `[t, h]`: normed input.
    pub norm: Tensor,
    /// `[t, 2 f]`: gate and up, then their gradient.
    pub gate_up: Tensor,
    /// `[t, f]`: activation, then its gradient.
    pub act: Tensor,
    /// `[t, h]`: gradient of the normed input.
    pub d_norm: Tensor,
}

/// Where gate and up stand when a layer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUp {
    /// To be computed into `work.gate_up`.
    Compute,
    /// Already in `work.gate_up`, kept from an earlier forward.
    Kept,
}

/// Forward over the rows of `x` `[t, h]`, in place.
pub fn forward<B: Backend>(b: &mut B, x: Tensor, w: &Weights, work: &Work, gate_up: GateUp, eps: f64) -> Result {
    if gate_up == GateUp::Compute {
        b.rmsnorm(work.norm, x, w.norm, eps)?;
        b.matmul(work.gate_up, work.norm, w.gate_up, 0.0)?;
    }
    b.swiglu(work.act, work.gate_up)?;
    b.matmul(x, work.act, w.down, 1.0)
}

/// What backward reads beside its work: the layer's input rows and weights.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// `[t, h]`
    pub x: Tensor,
    pub w: &'a Weights,
    pub gate_up: GateUp,
}

/// Backward over the same rows: `dy` `[t, h]` becomes the gradient of `x`; `dw` is added to.
pub fn backward<B: Backend>(b: &mut B, dy: Tensor, saved: Saved, dw: &Weights, work: &Work, eps: f64) -> Result {
    let Saved { x, w, gate_up } = saved;
    b.rmsnorm(work.norm, x, w.norm, eps)?;
    if gate_up == GateUp::Compute {
        b.matmul(work.gate_up, work.norm, w.gate_up, 0.0)?;
    }
    b.swiglu(work.act, work.gate_up)?;
    b.matmul_dw(dw.down, dy, work.act)?;
    b.matmul_dx(work.act, dy, w.down, 0.0)?;
    b.swiglu_backward(work.gate_up, work.act)?;
    b.matmul_dw(dw.gate_up, work.gate_up, work.norm)?;
    b.matmul_dx(work.d_norm, work.gate_up, w.gate_up, 0.0)?;
    b.rmsnorm_backward(dy, dw.norm, work.d_norm, x, w.norm, eps)
}
