//! Gradients summed a layer at a time == gradients summed in the flat tensor, bit for bit where storage is the wide type.

use longhaul::plan::{Forced, Gradients};

use super::{assert_same_bits, documents, plain, run};
use crate::support::model::config;

#[test]
fn sums_of_one_layer_at_a_time_are_the_flat_sums() {
    for tied in [false, true] {
        let config = config(tied);
        let tokens = documents(&config);
        let base = Forced { chunk_tokens: Some(16), ..plain(tokens.ids.len() as u64, &config) };
        for slots in [2, config.n_layers] {
            let of = |kind| {
                let forced = Forced { checkpoint_slots: Some(slots), gradients: Some(kind), ..base };
                run(&config, forced, &[tokens.batch()])
            };
            let what = format!("{slots} slots, tied {tied}");
            assert_same_bits(&of(Gradients::Storage), &of(Gradients::Wide), &what);
        }
    }
}
