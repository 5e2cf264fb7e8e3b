//! Learning rates by step, and which parameters are decayed.

use longhaul::engine::optim::{
    Group, joined,
    schedule::{Schedule, Shape},
};

#[test]
fn rates_rise_hold_and_fall() {
    let schedule = |shape| Schedule { shape, peak: 2.0, warmup_steps: 4, total_steps: 14, min_ratio: 0.1 };
    for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
        let s = schedule(shape);
        assert_eq!((1..=4).map(|i| s.rate(i)).collect::<Vec<_>>(), [0.5, 1.0, 1.5, 2.0]);
        assert_eq!(s.rate(5), 2.0);
        assert!((5..14).all(|i| s.rate(i + 1) <= s.rate(i)));
    }
    assert_eq!(schedule(Shape::Constant).rate(14), 2.0);
    assert!((schedule(Shape::Linear).rate(14) - 0.2).abs() < 1e-12);
    assert!((schedule(Shape::Cosine).rate(14) - 0.2).abs() < 1e-12);
    // Half-way down a cosine stands the mean of peak and floor.
    let odd = Schedule { total_steps: 15, ..schedule(Shape::Cosine) };
    assert!((odd.rate(10) - 1.1).abs() < 1e-12);
}

#[test]
fn a_run_of_one_step_trains() {
    for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
        let s = Schedule { shape, peak: 1.0, warmup_steps: 0, total_steps: 1, min_ratio: 0.0 };
        assert_eq!(s.rate(1), 1.0);
    }
    let s = Schedule { shape: Shape::Cosine, peak: 1.0, warmup_steps: 10, total_steps: 5, min_ratio: 0.0 };
    assert_eq!(s.rate(5), 0.5, "a rise longer than the run is cut off, not divided by zero");
}

#[test]
fn neighbours_that_are_updated_alike_are_one_group() {
    let group = |start, elements, first_index, decayed| Group { start, elements, first_index, decayed };
    let joined = joined([
        group(0, 10, 0, true),
        group(10, 2, 10, false),
        group(12, 5, 12, true),
        group(17, 6, 17, true),
        // A gap in the rank's memory, then one in the order of all parameters.
        group(24, 2, 23, true),
        group(26, 1, 30, true),
        group(27, 4, 31, true),
    ]);
    let expected = [
        group(0, 10, 0, true),
        group(10, 2, 10, false),
        group(12, 11, 12, true),
        group(24, 2, 23, true),
        group(26, 5, 30, true),
    ];
    assert_eq!(joined, expected);
}

#[test]
fn steps_walk_every_epoch_once() {
    use longhaul::engine::train::order::Order;
    let order = Order::epochs(5, 3, 2);
    assert_eq!(order.total_steps, 4);
    let walked: Vec<_> = (1..=4).flat_map(|step| order.of_step(step)).collect();
    let expected: Vec<_> = (0..2).flat_map(|epoch| (0..5).map(move |i| (epoch, i))).collect();
    assert_eq!(walked, expected);
    assert_eq!(order.of_step(4).count(), 1, "the last step takes what is left");
    let order = Order::steps(2, 3, 2);
    assert_eq!(order.of_step(2).collect::<Vec<_>>(), [(1, 1), (2, 0), (2, 1)]);
}
