//! Feed-forward in tiles == in one piece: the loss bit for bit, weight gradients but for the order of a sum.

use longhaul::plan::Forced;

use super::{assert_close, documents, plain, run};
use crate::support::model::config;

#[test]
fn tiles_are_the_whole() {
    let config = config(false);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let whole = run(&config, plain(n, &config), &[tokens.batch()]);
    for rows in [1, 7, 32, n - 1] {
        let tiled = run(&config, Forced { mlp_tile_rows: Some(rows), ..plain(n, &config) }, &[tokens.batch()]);
        assert_eq!(tiled.0.to_bits(), whole.0.to_bits(), "rows are independent in forward");
        assert_close(&tiled, &whole, 1e-13, &format!("tiles of {rows}"));
    }
}
