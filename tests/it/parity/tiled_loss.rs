//! Head and loss in tiles == in one piece, but for the order of sums.

use longhaul::plan::Forced;

use super::{assert_close, documents, plain, run};
use crate::support::model::config;

#[test]
fn tiles_are_the_whole() {
    for tied in [false, true] {
        let config = config(tied);
        let tokens = documents(&config);
        let n = tokens.ids.len() as u64;
        let whole = run(&config, plain(n, &config), &[tokens.batch()]);
        for rows in [1, 7, 32, n - 1] {
            let tiled = run(&config, Forced { loss_tile_rows: Some(rows), ..plain(n, &config) }, &[tokens.batch()]);
            assert_close(&tiled, &whole, 1e-13, &format!("tiles of {rows}"));
        }
    }
}
