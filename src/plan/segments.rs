//! Which layer inputs are kept in a step: segments of layers that shrink towards the last one.
//!
//! Backward takes segments last to first. It re-runs a segment from its start to rebuild the inputs between, while the
//! starts of all earlier segments wait. So segment i (from 0) of n layers needs i starts before it, its own, and n - 2
//! rebuilt inputs (the last one is still in the residual stream): i + 1 + max(0, n - 2) slots at once. Segments may
//! therefore be longer the earlier they come, and the number of segments equals the number of slots.

/// Starts of the segments of `n_layers` layers, ascending from 0, such that never more than `slots` layer inputs are
/// held; `None` when so few slots cannot carry so many layers. With `slots >= n_layers` every layer is a start.
pub fn starts(n_layers: u64, slots: u64) -> Option<Vec<u64>> {
    if n_layers == 0 || slots == 0 || n_layers > capacity(slots) {
        return None;
    }
    let segments = slots.min(n_layers);
    let mut spare = n_layers - segments;
    let mut start = 0;
    let mut out = Vec::new();
    for i in 0..segments {
        // The longest segment whose rebuilt inputs still fit beside the starts before it.
        let longest = slots - i + 1;
        let length = 1 + spare.min(longest - 1);
        out.push(start);
        start += length;
        spare -= length - 1;
    }
    Some(out)
}

/// Most layers that `slots` slots can carry: the sum over i of slots - i + 1.
fn capacity(slots: u64) -> u64 {
    slots * (slots + 1) / 2 + slots
}

/// Fewest slots that carry `n_layers` layers.
pub fn fewest_slots(n_layers: u64) -> u64 {
    (1..=n_layers).find(|s| capacity(*s) >= n_layers).unwrap_or(1)
}

/// Slots in use at the worst moment of a backward over these segments.
pub fn slots_needed(starts: &[u64], n_layers: u64) -> u64 {
    (0..starts.len())
        .map(|i| {
            let end = starts.get(i + 1).copied().unwrap_or(n_layers);
            i as u64 + 1 + (end - starts[i]).saturating_sub(2)
        })
        .max()
        .unwrap_or(0)
}

/// Layers in the order in which a step comes to them: forward, then segment by segment from the last, each re-run but for its
/// last layer and walked back.
pub fn walk(starts: &[u64], n_layers: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..n_layers).collect();
    for (i, start) in starts.iter().enumerate().rev() {
        let end = starts.get(i + 1).copied().unwrap_or(n_layers);
        order.extend(*start..end - 1);
        order.extend((*start..end).rev());
    }
    order
}
