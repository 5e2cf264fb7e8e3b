//! Rotary positions of `trait Backend` on CUDA.

use super::{
    super::{DType, Heads, Tensor},
    Cuda,
    kernels::{
        Argument::{self, Count, Flag, Pointer},
        MOST_FREQUENCIES,
    },
    operations::{expect, rows},
};
use crate::engine::Result;

/// Threads of a block of rope_table, and of the kernels that turn.
const TABLE_THREADS: u32 = 256;
const THREADS: u32 = 128;

/// Variant by the size of a head: 16-byte accesses need each half of a head to be a multiple of 8 elements.
///
/// # Panics
/// When a head is odd or has more than 256 elements.
fn by_head<'a>(d: u64, wide: &'a str, single: &'a str) -> &'a str {
    assert!(d.is_multiple_of(2) && d / 2 <= MOST_FREQUENCIES as u64, "heads of {d} elements");
    if d.is_multiple_of(16) { wide } else { single }
}

impl Cuda {
    /// `Backend::rope_table`. Up to 128 frequencies.
    ///
    /// # Panics
    /// When there are more.
    pub fn rope_table(&mut self, table: Tensor, positions: Tensor, frequencies: &[f64]) -> Result {
        let (c, half) = (positions.rows, frequencies.len());
        expect("positions", positions, DType::I32, c, 1);
        expect("table", table, DType::F32, c, 2 * half as u64);
        let mut by_value = [0.0; MOST_FREQUENCIES];
        by_value[..half].copy_from_slice(frequencies);
        let [table, positions] = [table, positions].map(|tensor| Pointer(self.device.address(tensor)));
        let arguments = [table, positions, Count(c as i64), Flag(half as i32), Argument::Frequencies(&by_value)];
        let grid = self.flat(c * half as u64, TABLE_THREADS, 1);
        self.kernels.launch(&self.device, "rope_table", grid, &arguments)
    }

    /// `Backend::rope_split`. Heads of up to 256 elements.
    pub fn rope_split(
        &mut self,
        q: Option<Tensor>,
        kv: Option<(Tensor, Tensor)>,
        qkv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        let (c, d) = (table.rows, heads.head_dim);
        let (nq, nk) = (q.map_or(0, |_| heads.n_heads), kv.map_or(0, |_| heads.n_kv_heads));
        expect("table", table, DType::F32, c, d);
        expect("qkv", qkv, DType::Bf16, c, (nq + 2 * nk) * d);
        let parts = [("q", q, nq), ("k", kv.map(|(k, _)| k), nk), ("v", kv.map(|(_, v)| v), nk)];
        let [q, k, v] = parts.map(|(name, part, n)| {
            // An absent part has no heads, and its address is not used.
            let Some(part) = part else { return Pointer(0) };
            expect(name, part, DType::Bf16, c, n * d);
            Pointer(self.device.address(part))
        });
        let [qkv, table] = [qkv, table].map(|tensor| Pointer(self.device.address(tensor)));
        let arguments = [q, k, v, qkv, table, Flag(nq as i32), Flag(nk as i32), Flag(d as i32)];
        let kernel = by_head(d, "rope_split_8", "rope_split_1");
        self.kernels.launch(&self.device, kernel, rows(c, THREADS), &arguments)
    }

    /// `Backend::rope_merge_backward`. Heads of up to 256 elements.
    pub fn rope_merge_backward(
        &mut self,
        dqkv: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: Tensor,
        heads: Heads,
    ) -> Result {
        let Heads { n_heads: nq, n_kv_heads: nk, head_dim: d } = heads;
        let c = table.rows;
        expect("table", table, DType::F32, c, d);
        expect("dqkv", dqkv, DType::Bf16, c, (nq + 2 * nk) * d);
        expect("dq", dq, DType::Bf16, c, nq * d);
        expect("dk", dk, DType::F32, c, nk * d);
        expect("dv", dv, DType::F32, c, nk * d);
        let [dqkv, dq, dk, dv, table] = [dqkv, dq, dk, dv, table].map(|tensor| Pointer(self.device.address(tensor)));
        let arguments = [dqkv, dq, dk, dv, table, Flag(nq as i32), Flag(nk as i32), Flag(d as i32)];
        let kernel = by_head(d, "rope_merge_backward_8", "rope_merge_backward_1");
        self.kernels.launch(&self.device, kernel, rows(c, THREADS), &arguments)
    }
}
