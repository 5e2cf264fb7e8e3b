//! Any segment starts, any place, any kept tensors == every input in memory and nothing else kept, bit for bit.

use longhaul::plan::{Forced, Place, segments};

use super::{assert_same_bits, documents, plain, run};
use crate::support::model::config;

/// `base` with every number of slots that carries the layers, in every place.
pub fn slots_and_places(base: Forced, n_layers: u64) -> Vec<(String, Forced)> {
    let mut choices = Vec::new();
    for slots in segments::fewest_slots(n_layers)..=n_layers {
        for place in [Place::Memory, Place::Disk] {
            let forced = Forced { checkpoint_slots: Some(slots), place: Some(place), ..base };
            choices.push((format!("{slots} slots, {place:?}"), forced));
        }
    }
    choices
}

/// `base` with every number of slots, of which some rows, up to all, are in host memory.
pub fn host_rows(base: Forced, n_layers: u64, tokens: u64) -> Vec<(String, Forced)> {
    let mut choices = Vec::new();
    for slots in segments::fewest_slots(n_layers)..=n_layers {
        for rows in [1, 16, tokens + 7, slots * tokens - 1, slots * tokens] {
            let forced = Forced { checkpoint_slots: Some(slots), checkpoint_host_rows: Some(rows), ..base };
            choices.push((format!("{slots} slots, {rows} rows in host memory"), forced));
        }
    }
    choices
}

/// `base` with intermediates of some of five layers kept: each kind alone, all, and mixtures.
pub fn kept_sets(base: Forced) -> Vec<(String, Forced)> {
    let of = |(attention, qkv, gate_up)| {
        let forced = Forced {
            kept_attention_layers: Some(attention),
            kept_qkv_layers: Some(qkv),
            kept_gate_up_layers: Some(gate_up),
            ..base
        };
        (format!("kept {attention} {qkv} {gate_up}"), forced)
    };
    [(5, 0, 0), (0, 5, 0), (0, 0, 5), (5, 5, 5), (2, 3, 1), (3, 1, 4), (1, 0, 5), (4, 5, 0)].map(of).to_vec()
}

#[test]
fn any_segment_starts_and_places_are_all_inputs_kept() {
    let config = config(false);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
    let all = run(&config, base, &[tokens.batch()]);
    for (what, forced) in slots_and_places(base, config.n_layers) {
        assert_same_bits(&run(&config, forced, &[tokens.batch()]), &all, &what);
    }
}

#[test]
fn inputs_in_host_memory_are_inputs_on_the_device() {
    let config = config(false);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
    let resident = run(&config, base, &[tokens.batch()]);
    for (what, forced) in host_rows(base, config.n_layers, n) {
        assert_same_bits(&run(&config, forced, &[tokens.batch()]), &resident, &what);
    }
}

#[test]
fn any_kept_tensors_are_none_kept() {
    let config = config(true);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    for slots in [2, config.n_layers] {
        let base = Forced { chunk_tokens: Some(16), checkpoint_slots: Some(slots), ..plain(n, &config) };
        let none = run(&config, base, &[tokens.batch()]);
        for (what, forced) in kept_sets(base) {
            assert_same_bits(&run(&config, forced, &[tokens.batch()]), &none, &format!("{slots} slots, {what}"));
        }
    }
}

#[test]
fn segments_never_hold_more_than_their_slots() {
    for n_layers in 1..=130 {
        let fewest = segments::fewest_slots(n_layers);
        assert!(segments::starts(n_layers, fewest - 1).is_none());
        for slots in fewest..=n_layers {
            let starts = segments::starts(n_layers, slots).expect("enough slots");
            assert_eq!(starts.len() as u64, slots.min(n_layers));
            assert!(starts[0] == 0 && starts.is_sorted_by(|a, b| a < b) && *starts.last().unwrap() < n_layers);
            assert!(segments::slots_needed(&starts, n_layers) <= slots, "{n_layers} layers, {slots} slots: {starts:?}");
        }
    }
    assert_eq!(segments::fewest_slots(32), 7);
}
