//! Sums of pieces that lie in host bytes, in a fixed order.

use half::bf16;

use crate::engine::backend::{DType, cpu::element::Storage};

/// The sum of equally long pieces, element by element, the first piece first, in the wide type and rounded once.
///
/// # Panics
/// When the elements are not floats: a bug of the caller.
pub(super) fn sum(dtype: DType, pieces: &[&[u8]]) -> Vec<u8> {
    match dtype {
        DType::F32 => sum_of::<f32>(pieces),
        DType::F64 => sum_of::<f64>(pieces),
        DType::Bf16 => sum_of::<bf16>(pieces),
        DType::I32 | DType::U16 => panic!("{dtype:?} is not a type of sums"),
    }
}

fn sum_of<S: Storage>(pieces: &[&[u8]]) -> Vec<u8> {
    let (first, rest) = pieces.split_first().expect("a group has a rank");
    let mut total: Vec<S::Wide> = elements::<S>(first).map(Storage::widen).collect();
    for piece in rest {
        total.iter_mut().zip(elements::<S>(piece)).for_each(|(total, x)| *total += x.widen());
    }
    let mut bytes = vec![0; first.len()];
    let slots = bytes.chunks_exact_mut(size_of::<S>());
    slots.zip(total).for_each(|(slot, wide)| slot.copy_from_slice(bytemuck::bytes_of(&S::narrow(wide))));
    bytes
}

/// Elements of bytes that need not be aligned.
fn elements<S: Storage>(bytes: &[u8]) -> impl Iterator<Item = S> {
    bytes.chunks_exact(size_of::<S>()).map(bytemuck::pod_read_unaligned)
}
