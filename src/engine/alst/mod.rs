//! The rooms of Arctic Long Sequence Training (arXiv 2506.13996): each one memory trick, each its own file and parity test.
//!
//! | room | what it saves | price | with one rank or tile |
//! |---|---|---|---|
//! | `ulysses` | rows and heads of the other ranks | q, k, v, o and their gradients cross between ranks, beside the work on other chunks | is `layers::attention` |
//! | `tiled_mlp` | gate, up, activation of all rows but one tile | none: rows are independent | is `layers::mlp` |
//! | `tiled_loss` | logits of all rows but one tile | none: gradients are made in the forward pass | is `layers::loss` |
//! | `checkpoint_offload` | every layer's intermediates, and most layer inputs | a forward per rebuilt layer, or link and disk traffic | keeps every input in place |
//! | `zero3` | weights of all layers but two on the device | their bytes cross the link at every visit, beside the work | hands out what is resident |
//! | `optimizer_offload` | moments and low halves on the device | each of their bytes crosses the link twice a step | is `optim::update` |
//!
//! Two door shapes. A wrapping room (`ulysses`, `tiled_*`) takes the arguments of its plain twin and its own tile size. A keeping
//! room owns tensors and hands them out. Rooms do not import each other; the model composes them.

pub mod checkpoint_offload;
pub mod optimizer_offload;
pub mod tiled_loss;
pub mod tiled_mlp;
pub mod ulysses;
pub mod zero3;
