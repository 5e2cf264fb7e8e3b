//! Cross entropy: its sums against the formula, its gradient against slopes of the sum.

use longhaul::engine::backend::Backend;

use super::{assert_close, bench_f64};

#[test]
fn sums_and_gradient() {
    for vocab in [2, 17, 50] {
        let labels = [1, -100, 0, vocab as i32 - 1, -100, 1];
        let mut bench = bench_f64(6);
        let (logits, labels_at) = (bench.input(6, vocab), bench.indices(&labels));
        let spread: Vec<f64> = bench.get(logits).iter().map(|x| x * 8.0 + 300.0).collect();
        bench.set(logits, &spread);
        let sums = bench.sum(1, 2);
        let before = bench.get(sums);
        bench.b.cross_entropy(sums, logits, labels_at, None).unwrap();
        assert_eq!(bench.get(logits), spread, "without a gradient the logits stay");

        let (mut loss, mut correct) = (0.0, 0.0);
        for (row, label) in spread.chunks(vocab as usize).zip(labels) {
            let Ok(label) = usize::try_from(label) else { continue };
            let total: f64 = row.iter().map(|x| (x - row[label]).exp()).sum();
            loss += total.ln();
            correct += f64::from(u8::from(row.iter().all(|x| *x <= row[label])));
        }
        let after = bench.get(sums);
        assert_close("sums", &[after[0] - before[0], after[1] - before[1]], &[loss, correct], 1e-12);

        let factor = 0.37;
        let slopes = bench.slopes(logits, |bench| {
            bench.set(sums, &[0.0, 0.0]);
            bench.b.cross_entropy(sums, logits, labels_at, None).unwrap();
            bench.get(sums)[0] * factor
        });
        bench.b.cross_entropy(sums, logits, labels_at, Some(factor)).unwrap();
        let gradient = bench.get(logits);
        assert_close("gradient", &gradient, &slopes, 1e-7);
        for row in [1, 4] {
            let row = &gradient[row * vocab as usize..][..vocab as usize];
            assert!(row.iter().all(|g| *g == 0.0), "a row that counts nothing");
        }
    }
}

#[test]
fn the_first_of_equal_logits_is_the_guess() {
    let mut bench = bench_f64(7);
    let (logits, labels) = (bench.input(3, 4), bench.indices(&[2, 1, 0]));
    bench.set(logits, &[0.0, 5.0, 5.0, 1.0, 0.0, 5.0, 5.0, 1.0, f64::MIN, 0.0, 0.0, 0.0]);
    let sums = bench.sum(1, 2);
    bench.set(sums, &[0.0, 0.0]);
    bench.b.cross_entropy(sums, logits, labels, None).unwrap();
    assert_close("right guesses", &bench.get(sums)[1..], &[1.0], 0.0);
}
