//! What has no derivative: fills, casts, sums, squares, the clipping factor, copies and spills.

use half::bf16;
use longhaul::engine::backend::{Backend, DType, Space, Stream, Tensor, cpu::Cpu};

use super::{Bench, assert_close, bench_f64};

#[test]
fn casts_round_to_nearest_even() {
    let mut bench = Bench::new(Cpu::<bf16>::new(1).unwrap(), 30);
    // 1 + 2^-8 lies half-way between two bf16 numbers, as does 1 + 3 * 2^-8; each goes to the even one.
    let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 - 1.0 / 256.0, 1.003_907, 3.0e38, 1e-40, 0.0];
    let (wide, narrow) = (bench.sum(1, 7), bench.output(1, 7));
    bench.set(wide, &values);
    bench.b.cast(narrow, wide).unwrap();
    let expected = values.map(|v| f64::from(bf16::from_f32(v as f32)));
    assert_eq!(bench.get(narrow), expected);
    assert_eq!(expected[..3], [1.0, 1.0 + 4.0 / 256.0, -1.0]);
    bench.b.cast(wide, narrow).unwrap();
    assert_eq!(bench.get(wide), expected);
}

#[test]
fn sums_go_by_every_pair_of_types() {
    let mut bench = Bench::new(Cpu::<bf16>::new(2).unwrap(), 31);
    let n = (1 << 16) + 77;
    for (to_wide, from_wide) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut tensor = |wide: bool| if wide { bench.sum(1, n) } else { bench.input(1, n) };
        let (to, from) = (tensor(to_wide), tensor(from_wide));
        let (a, b) = (bench.get(to), bench.get(from));
        bench.b.accumulate(to, from).unwrap();
        let add = |(a, b): (&f64, &f64)| {
            let sum = *a as f32 + *b as f32;
            if to_wide { f64::from(sum) } else { f64::from(bf16::from_f32(sum)) }
        };
        assert_eq!(bench.get(to), a.iter().zip(&b).map(add).collect::<Vec<_>>());
        bench.end = 0;
    }
}

#[test]
fn squares_are_added_and_threads_change_no_bit() {
    let n = 3 * (1 << 16) + 5;
    let sum_on = |threads| {
        let mut bench = Bench::new(Cpu::<f32>::new(threads).unwrap(), 32);
        let (x, sum) = (bench.input(1, n), bench.sum(1, 1));
        bench.set(sum, &[2.0]);
        bench.b.sum_squares(sum, x).unwrap();
        let expected = 2.0 + bench.get(x).iter().map(|x| x * x).sum::<f64>();
        let got = bench.get(sum);
        assert_close("sum of squares", &got, &[expected], 1e-7);
        got[0].to_bits()
    };
    assert_eq!(sum_on(1), sum_on(3));
}

#[test]
fn the_clipping_factor_is_pytorchs() {
    let mut bench = bench_f64(33);
    let (scale, sum) = (bench.sum(1, 1), bench.sum(1, 1));
    for (squares, max_norm, expected) in
        [(25.0, 1.0, 1.0 / (5.0 + 1e-6)), (0.25, 1.0, 1.0), (25.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
    {
        bench.set(sum, &[squares]);
        bench.b.clip_scale(scale, sum, max_norm).unwrap();
        assert_close("scale", &bench.get(scale), &[expected], 1e-15);
    }
}

#[test]
fn fills_reach_every_element_and_no_other() {
    let mut bench = Bench::new(Cpu::<bf16>::new(2).unwrap(), 34);
    for dtype in [DType::F32, DType::Bf16, DType::F64] {
        let all = bench.empty(dtype, 3, 5);
        bench.b.fill(all, 1.0).unwrap();
        bench.b.fill(all.rows(1, 2), -2.5).unwrap();
        let expected: Vec<f64> = (0..15).map(|i| if i / 5 == 1 { -2.5 } else { 1.0 }).collect();
        assert_eq!(bench.get(all), expected);
    }
}

#[test]
fn copies_and_spills_bring_back_the_same_bytes() {
    let mut bench = bench_f64(35);
    let (a, b) = (bench.input(7, 3), bench.output(7, 3));
    let values = bench.get(a);
    let host = Tensor { space: Space::Host, ..a };
    let host_too = Tensor { offset: host.offset + host.bytes(), ..host };
    for (to, from) in [(host, a), (host_too, host), (b, host_too)] {
        bench.b.copy(Stream::Down, to, from).unwrap();
    }
    assert_eq!(bench.get(b), values);
    let path = std::env::temp_dir().join(format!("longhaul-spill-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    bench.b.spill(Stream::Down, &file, 40, a.rows(2, 5)).unwrap();
    bench.b.fill(b, 0.0).unwrap();
    bench.b.unspill(Stream::Up, &file, 40, b.rows(2, 5)).unwrap();
    assert_eq!(bench.get(b)[6..15], values[6..15]);
    assert_eq!(bench.get(b)[15..], [0.0; 6]);
}

#[test]
fn blocks_of_columns_move_and_nothing_beside_them() {
    let mut bench = bench_f64(34);
    let (rows, to_cols, from_cols) = (5, 9, 7);
    for (to_first, from_first, width) in [(0, 0, 7), (2, 3, 4), (8, 6, 1), (4, 0, 0)] {
        for add in [false, true] {
            let (to, from) = (bench.sum(rows, to_cols), bench.sum(rows, from_cols));
            let (before, source) = (bench.get(to), bench.get(from));
            let operation = if add { Backend::add_columns } else { Backend::copy_columns };
            operation(&mut bench.b, (to, to_first), (from, from_first), width).unwrap();
            let mut expected = before;
            for row in 0..rows {
                for column in 0..width {
                    let place = &mut expected[(row * to_cols + to_first + column) as usize];
                    let value = source[(row * from_cols + from_first + column) as usize];
                    *place = if add { *place + value } else { value };
                }
            }
            assert_eq!(bench.get(to), expected, "{to_first} {from_first} {width} {add}");
            bench.end = 0;
        }
    }
}
