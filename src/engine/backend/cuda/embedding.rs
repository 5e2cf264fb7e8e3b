//! Embedding look-up of `trait Backend` on CUDA, and its backward: ids are sorted piece by piece, then rows are added in order.

use super::{
    super::{DType, Tensor},
    Cuda,
    kernels::Argument::{Count, Flag, Pointer},
    operations::{expect, rows, wide_or_single},
};
use crate::engine::Result;

/// Threads of most blocks in embedding.cu, and of embedding_scan.
const THREADS: u32 = 256;
const SCAN_THREADS: u32 = 1024;
/// Words of a row that a block of embedding_backward adds: 32 for each of its 8 warps.
const WORDS_OF_A_BLOCK: u64 = 256;
/// Pairs that a block sorts, values of a digit, bits of one.
const TILE: u64 = 2048;
const DIGITS: u64 = 256;
const DIGIT_BITS: u32 = 8;
/// Tokens whose ids are sorted together.
const PIECE: u64 = 1 << 19;

impl Cuda {
    /// `Backend::embedding`. An id outside the table makes its row NaN.
    pub fn embedding(&mut self, x: Tensor, ids: Tensor, table: Tensor) -> Result {
        let (n, vocab, h) = (ids.rows, table.rows, table.cols);
        expect("ids", ids, DType::I32, n, 1);
        expect("x", x, DType::Bf16, n, h);
        expect("table", table, DType::Bf16, vocab, h);
        let [x, ids, table] = [x, ids, table].map(|tensor| Pointer(self.device.address(tensor)));
        let kernel = wide_or_single(h, "embedding_8", "embedding_1");
        let arguments = [x, ids, table, Count(vocab as i64), Count(h as i64)];
        self.kernels.launch(&self.device, kernel, rows(n, THREADS), &arguments)
    }

    /// `Backend::embedding_backward`. Ids outside the table are left out.
    pub fn embedding_backward(&mut self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result {
        let (n, vocab, h) = (ids.rows, dtable.rows, dtable.cols);
        expect("ids", ids, DType::I32, n, 1);
        expect("dtable", dtable, DType::F32, vocab, h);
        expect("dx", dx, DType::Bf16, n, h);
        for start in (0..n).step_by(PIECE as usize) {
            let end = n.min(start + PIECE);
            self.embedding_piece(dtable, ids.rows(start, end), dx.rows(start, end))?;
        }
        Ok(())
    }

    /// The same for as many tokens as the scratch has room to sort. Later pieces add to what earlier ones left, so their
    /// order is the tokens'.
    fn embedding_piece(&self, dtable: Tensor, ids: Tensor, dx: Tensor) -> Result {
        let (n, vocab, h) = (ids.rows, dtable.rows, dtable.cols);
        let tiles = n.div_ceil(TILE);
        // Pairs and where they are sorted to, 8 bytes each, and the counts of the digits, 4 bytes each.
        let scratch = self.device.address(self.scratch(2 * n + tiles * DIGITS / 2, 2));
        let (mut pairs, mut sorted, counts) = (scratch, scratch + n * 8, Pointer(scratch + 2 * n * 8));
        let (length, vocabulary) = (Count(n as i64), Count(vocab as i64));
        let arguments = [Pointer(pairs), Pointer(self.device.address(ids)), length, vocabulary];
        let blocks = rows(n.div_ceil(u64::from(THREADS)), THREADS);
        self.kernels.launch(&self.device, "embedding_pairs", blocks, &arguments)?;
        // Ids go up to V itself, which stands for any that is not in the table.
        let bits = u64::BITS - vocab.leading_zeros();
        for shift in (0..bits).step_by(DIGIT_BITS as usize) {
            let (shift, blocks) = (Flag(shift as i32), rows(tiles, THREADS));
            self.kernels.launch(&self.device, "embedding_count", blocks, &[counts, Pointer(pairs), length, shift])?;
            let arguments = [counts, Count((tiles * DIGITS) as i64)];
            self.kernels.launch(&self.device, "embedding_scan", rows(1, SCAN_THREADS), &arguments)?;
            let arguments = [Pointer(sorted), Pointer(pairs), counts, length, shift];
            self.kernels.launch(&self.device, "embedding_place", blocks, &arguments)?;
            (pairs, sorted) = (sorted, pairs);
        }
        let (words, kernel) =
            if h.is_multiple_of(2) { (h / 2, "embedding_backward_2") } else { (h, "embedding_backward_1") };
        let blocks_of_a_row = words.div_ceil(WORDS_OF_A_BLOCK);
        let [dtable, dx] = [dtable, dx].map(|tensor| Pointer(self.device.address(tensor)));
        let row = [Count(h as i64), Count(blocks_of_a_row as i64)];
        let arguments = [dtable, dx, Pointer(pairs), length, vocabulary, row[0], row[1]];
        self.kernels.launch(&self.device, kernel, rows(n * blocks_of_a_row, THREADS), &arguments)
    }
}
