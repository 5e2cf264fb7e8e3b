//! One arena: a block of memory taken once and read through typed views.
//!
//! The block comes from the system as untouched zero pages, so bytes that no operation reaches cost nothing. Views of one
//! call are disjoint by check, not by trust: a call whose tensors overlap is a bug of ours and panics.

use std::ops::Range;

use bytemuck::Pod;

use super::tensor::Tensor;

/// The block.
#[derive(Debug, Default)]
pub struct Arena {
    words: Vec<u64>,
}

impl Arena {
    /// A block of at least `bytes` bytes, or `None` when the system has not so much address space.
    pub fn reserve(bytes: u64) -> Option<Self> {
        let words = usize::try_from(bytes.div_ceil(8)).ok()?;
        // A failed `vec!` aborts; asking first lets the caller say what was too much.
        Vec::<u64>::new().try_reserve_exact(words).ok()?;
        Some(Self { words: vec![0; words] })
    }

    /// Mutable bytes of several tensors at once.
    ///
    /// # Panics
    /// When two of them overlap or one leaves the block.
    pub fn bytes<const N: usize>(&mut self, tensors: [Tensor; N]) -> [&mut [u8]; N] {
        let ranges: [Range<usize>; N] = tensors.map(|t| t.offset as usize..(t.offset + t.bytes()) as usize);
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.words)
            .get_disjoint_mut(ranges)
            .unwrap_or_else(|error| panic!("tensors of one operation {error}: {tensors:?}"))
    }

    /// Address range of the block, for asking the system what of it is in memory.
    pub fn address(&self) -> Range<usize> {
        let start = self.words.as_ptr() as usize;
        start..start + self.words.len() * 8
    }
}

/// Bytes as elements.
///
/// # Panics
/// When they are not aligned for `E`: the layout aligns every region.
pub fn elements<E: Pod>(bytes: &mut [u8]) -> &mut [E] {
    bytemuck::cast_slice_mut(bytes)
}
