//! What attention does besides the library's calls: gradients added up, rows of packed documents copied to a call and back,
//! parts of an output put together. Errors against plain loops, bytes a second at sizes of an 8B model.

use serde_json::json;

use super::{
    Report,
    twin::{Twin, Twins},
};
use crate::engine::{
    Result,
    backend::{
        DType,
        cuda::{MOST_STAGED, Staged},
    },
};

/// Sums and exponentials in f32.
const BOUND: f64 = 1e-6;
/// What rows that are not there have for a log-sum-exp.
const NOTHING_SEEN: f32 = 1e30;
/// Rows of the tensor that is checked, and its heads.
const ROWS: u64 = 400;
const HEADS: u64 = 9;

/// Three documents: one that began before the chunk, a full one, one that ends early. `heads` of a group, from `head` on.
fn staged(heads: u64, head: u64, head_dim: u64) -> Staged {
    let mut at = [[0; 3]; MOST_STAGED];
    at[..3].copy_from_slice(&[[-40, 40, 128], [88, 0, 128], [216, 0, 77]]);
    Staged { documents: 3, groups: 2, rows: 128, heads, head_dim, head, at }
}

/// Each element of a staged tensor, in order, with its row and column of the whole if it has one.
fn places(staged: &Staged) -> Vec<Option<(u64, u64)>> {
    let width = staged.heads * staged.head_dim;
    let mut places = Vec::new();
    for [first, from, to] in &staged.at[..staged.documents as usize] {
        for group in 0..staged.groups {
            for row in 0..staged.rows as i32 {
                let inside = (from..to).contains(&&row);
                let column = staged.head * staged.head_dim + group * width;
                places.extend((0..width).map(|j| inside.then_some(((first + row) as u64, column + j))));
            }
        }
    }
    places
}

pub(super) fn check(t: &mut Twins, report: &mut Report) -> Result {
    for (heads, head, head_dim) in [(1, 3, 64), (4, 0, 128), (3, 2, 8)] {
        let staged = staged(heads, head, head_dim);
        rows(t, report, &staged)?;
        statistics(t, report, &staged)?;
        for first in [true, false] {
            merge(t, report, &staged, first)?;
        }
    }
    accumulate(t, report)
}

fn shape(staged: &Staged) -> serde_json::Value {
    json!([staged.documents, staged.groups, staged.rows, staged.heads, staged.head_dim])
}

fn rows(t: &mut Twins, report: &mut Report, staged: &Staged) -> Result {
    t.clear();
    let cols = HEADS * staged.head_dim;
    let places = places(staged);
    let (whole, copied) = (t.storage(ROWS, cols, 0.0, 1.0)?, t.output(DType::Bf16, 1, places.len() as u64)?);
    t.gpu.stage(staged, t.gpu.device.address(copied.gpu), whole.gpu)?;
    let from = t.expected(whole)?;
    let expected: Vec<f32> =
        places.iter().map(|place| place.map_or(0.0, |(row, column)| from[(row * cols + column) as usize])).collect();
    t.expect(copied, &expected)?;
    report.errors("attention_stage", &shape(staged), &[("staged", t.error(copied)?)], 0.0)?;

    let (part, sums) = (t.storage(1, places.len() as u64, 0.0, 1.0)?, t.wide(ROWS, cols)?);
    t.gpu.add_staged(staged, t.gpu.device.address(part.gpu), sums.gpu)?;
    let (from, mut expected) = (t.expected(part)?, t.expected(sums)?);
    for (place, x) in places.iter().zip(from) {
        if let Some((row, column)) = place {
            expected[(row * cols + column) as usize] += x;
        }
    }
    t.expect(sums, &expected)?;
    report.errors("attention_add_staged", &shape(staged), &[("sums", t.error(sums)?)], 0.0)
}

/// Places of log-sum-exps: those of rows with heads of one column, but laid out head by head.
fn of_statistics(staged: &Staged) -> Vec<Option<(u64, u64)>> {
    let mut each = Vec::new();
    let narrow = Staged { head_dim: 1, ..*staged };
    let by_row = places(&narrow);
    for block in by_row.chunks((staged.rows * staged.heads) as usize) {
        for head in 0..staged.heads as usize {
            each.extend(block.iter().skip(head).step_by(staged.heads as usize));
        }
    }
    each
}

fn statistics(t: &mut Twins, report: &mut Report, staged: &Staged) -> Result {
    t.clear();
    let places = of_statistics(staged);
    let (lse, copied) = (t.wide(HEADS, ROWS)?, t.output(DType::F32, 1, places.len() as u64)?);
    t.gpu.stage_statistics(staged, t.gpu.device.address(copied.gpu), lse.gpu)?;
    let from = t.expected(lse)?;
    let at = |(row, head): (u64, u64)| (head * ROWS + row) as usize;
    let expected: Vec<f32> = places.iter().map(|place| place.map_or(NOTHING_SEEN, |place| from[at(place)])).collect();
    t.expect(copied, &expected)?;
    report.errors("attention_stage_statistics", &shape(staged), &[("staged", t.error(copied)?)], 0.0)
}

/// By log-sum-exps far apart and near each other: half of the rows have sums that all but vanish, half a part that does.
fn merge(t: &mut Twins, report: &mut Report, staged: &Staged, first: bool) -> Result {
    t.clear();
    let cols = HEADS * staged.head_dim;
    let (places, of_rows) = (of_statistics(staged), places(staged));
    let (part, sums) = (t.storage(1, of_rows.len() as u64, 0.0, 1.0)?, t.wide(ROWS, cols)?);
    let (part_lse, lse) = (t.wide(1, places.len() as u64)?, t.wide(HEADS, ROWS)?);
    let (new, mut out, b, mut a) = (t.expected(part)?, t.expected(sums)?, t.expected(part_lse)?, t.expected(lse)?);
    let (rows, heads, d) = (staged.rows as usize, staged.heads as usize, staged.head_dim as usize);
    for (i, place) in of_rows.iter().enumerate() {
        let Some((row, column)) = place else { continue };
        let (line, head) = (i / (heads * d), i / d % heads);
        let of_part = f64::from(b[(line / rows * heads + head) * rows + line % rows]).exp();
        let there = f64::from(a[(column / staged.head_dim * ROWS + row) as usize]).exp();
        let sum = &mut out[(row * cols + column) as usize];
        let merged = (f64::from(*sum) * there + f64::from(new[i]) * of_part) / (there + of_part);
        *sum = if first { new[i] } else { merged as f32 };
    }
    for (place, b) in places.iter().zip(&b) {
        let Some((row, head)) = place else { continue };
        let a = &mut a[(head * ROWS + row) as usize];
        *a = if first { *b } else { (f64::from(*a).exp() + f64::from(*b).exp()).ln() as f32 };
    }
    let [at_part, at_part_lse] = [part, part_lse].map(|twin: Twin| t.gpu.device.address(twin.gpu));
    t.gpu.merge_output(staged, (sums.gpu, at_part), (lse.gpu, at_part_lse), first)?;
    t.gpu.merge_statistics(staged, (lse.gpu, at_part_lse), first)?;
    t.expect(sums, &out)?;
    t.expect(lse, &a)?;
    let errors = [("sums", t.error(sums)?), ("lse", t.error(lse)?)];
    report.errors(if first { "attention_merge, first" } else { "attention_merge" }, &shape(staged), &errors, BOUND)
}

fn accumulate(t: &mut Twins, report: &mut Report) -> Result {
    t.clear();
    let (rows, cols, row, column) = (130, 64, 70, 128);
    let (part, sums) = (t.storage(rows, cols, 0.0, 1.0)?, t.wide(ROWS, HEADS * cols)?);
    t.gpu.add_part((sums.gpu, row, column), t.gpu.device.address(part.gpu), rows, cols)?;
    let (from, mut expected) = (t.expected(part)?, t.expected(sums)?);
    for (i, x) in from.into_iter().enumerate() {
        let (r, j) = (i as u64 / cols, i as u64 % cols);
        expected[((row + r) * HEADS * cols + column + j) as usize] += x;
    }
    t.expect(sums, &expected)?;
    report.errors("attention_accumulate", &json!([rows, cols]), &[("sums", t.error(sums)?)], 0.0)
}

/// Sixteen documents of 2,048 tokens whose 32 query heads share 8 kv heads; log-sum-exps of sixty-four of 8,192.
pub(super) fn measure(t: &mut Twins, report: &mut Report) -> Result {
    t.clear();
    let documents = |documents: usize, rows: i32| {
        let mut at = [[0; 3]; MOST_STAGED];
        for (i, entry) in at[..documents].iter_mut().enumerate() {
            *entry = [i as i32 * rows, 0, rows];
        }
        Staged { documents: documents as u64, groups: 8, rows: rows as u64, heads: 4, head_dim: 128, head: 0, at }
    };
    let staged = documents(16, 2048);
    let (rows, cols) = (32_768, 4096);
    let (whole, part) = (t.noise_on_gpu(rows, cols)?, t.noise_on_gpu(rows, cols)?);
    let sums = t.gpu_only(DType::F32, rows, cols);
    t.gpu.fill(sums, 0.0)?;
    let n = whole.elements();
    let address = t.gpu.device.address(part);
    report.speed(t, "attention_stage of 128M", 4 * n, |gpu| gpu.stage(&staged, address, whole))?;
    report.speed(t, "attention_add_staged of 128M", 10 * n, |gpu| gpu.add_staged(&staged, address, sums))?;
    report.speed(t, "attention_accumulate [32768, 4096]", 10 * n, |gpu| {
        gpu.add_part((sums, 0, 0), address, rows, cols)
    })?;
    let of_statistics = documents(64, 8192);
    let (lse, part_lse) = (t.gpu_only(DType::F32, 32, 1 << 19), t.gpu_only(DType::F32, 1, 1 << 24));
    for statistics in [lse, part_lse] {
        t.gpu.fill(statistics, 1.0)?;
    }
    let (at_lse, n_lse) = (t.gpu.device.address(part_lse), lse.elements());
    report.speed(t, "attention_merge of 128M", 10 * n, |gpu| {
        gpu.merge_output(&staged, (sums, address), (lse, at_lse), false)
    })?;
    report.speed(t, "attention_stage_statistics of 16M", 8 * n_lse, |gpu| {
        gpu.stage_statistics(&of_statistics, at_lse, lse)
    })?;
    report.speed(t, "attention_merge_statistics of 16M", 12 * n_lse, |gpu| {
        gpu.merge_statistics(&of_statistics, (lse, at_lse), false)
    })?;

    let (from, to) = (t.gpu_only(DType::F32, rows, cols), sums);
    t.gpu.fill(from, 1.0)?;
    let (half, elements) = (cols / 2, rows * cols / 2);
    report.speed(t, "copy_columns bf16 [32768, 2048 of 4096]", 4 * elements, |gpu| {
        gpu.copy_columns((part, half), (whole, 0), half)
    })?;
    report.speed(t, "copy_columns f32 [32768, 2048 of 4096]", 8 * elements, |gpu| {
        gpu.copy_columns((to, half), (from, 0), half)
    })?;
    report.speed(t, "add_columns f32 [32768, 2048 of 4096]", 12 * elements, |gpu| {
        gpu.add_columns((to, half), (from, 0), half)
    })
}
