//! Layers' weights anywhere == all of them on the device, bit for bit.

use longhaul::plan::{Forced, segments};

use super::{assert_same_bits, documents, plain, run};
use crate::support::model::config;

/// `base` with the weights of some layers, up to all, in host memory.
pub fn weights_in_host_memory(base: Forced, config: &longhaul::domain::ModelConfig) -> Vec<(String, Forced)> {
    let of = |layers| {
        let forced = Forced {
            weights_host_layers: Some(layers),
            optimizer_host_elements: Some(config.n_params()),
            staged_elements: Some(10_000),
            ..base
        };
        (format!("weights of {layers} layers in host memory"), forced)
    };
    (1..=config.n_layers).map(of).collect()
}

#[test]
fn weights_in_host_memory_are_weights_on_the_device() {
    for tied in [false, true] {
        let config = config(tied);
        let tokens = documents(&config);
        let n = tokens.ids.len() as u64;
        let base = Forced { chunk_tokens: Some(16), ..plain(n, &config) };
        let resident = run(&config, base, &[tokens.batch(), tokens.batch()]);
        for slots in segments::fewest_slots(config.n_layers)..=config.n_layers {
            for (what, forced) in weights_in_host_memory(Forced { checkpoint_slots: Some(slots), ..base }, &config) {
                let streamed = run(&config, forced, &[tokens.batch(), tokens.batch()]);
                assert_same_bits(&streamed, &resident, &format!("{slots} slots, {what}"));
            }
        }
    }
}
