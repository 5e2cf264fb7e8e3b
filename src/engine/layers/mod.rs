//! The plain layers: one rank, whole tensors, no policy. Rooms of `alst/` wrap them; with one tile a room is its layer.
//!
//! Every layer here is pre-norm and residual: forward adds its output to `x` in place, backward turns `dy`, the gradient
//! of its output, into the gradient of its input in place.

pub mod attention;
pub mod loss;
pub mod mlp;
