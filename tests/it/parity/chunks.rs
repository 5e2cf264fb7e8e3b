//! The streamed layer: many chunks == one chunk, packed documents == the same documents apart.

use longhaul::plan::Forced;

use super::{assert_close, documents, plain, run};
use crate::support::model::{Tokens, config};

#[test]
fn many_chunks_are_one_chunk() {
    for tied in [false, true] {
        let config = config(tied);
        let tokens = documents(&config);
        let n = tokens.ids.len() as u64;
        let one = run(&config, plain(n, &config), &[tokens.batch()]);
        for chunk in [1, 3, 16, 17, 32, n - 1] {
            let forced = Forced { chunk_tokens: Some(chunk), ..plain(n, &config) };
            assert_close(&run(&config, forced, &[tokens.batch()]), &one, 1e-12, &format!("chunks of {chunk}"));
        }
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let config = config(false);
    let apart = [Tokens::random(config.vocab_size, &[19], 1), Tokens::random(config.vocab_size, &[30], 2)];
    let mut packed = Tokens { ids: vec![], labels: vec![], positions: vec![], documents: vec![] };
    for part in &apart {
        let start = packed.ids.len() as u64;
        packed.ids.extend(&part.ids);
        packed.labels.extend(&part.labels);
        packed.positions.extend(&part.positions);
        packed.documents.push(start..start + part.ids.len() as u64);
    }
    let forced = Forced { chunk_tokens: Some(8), ..plain(49, &config) };
    let together = run(&config, forced, &[packed.batch()]);
    let one_by_one = run(&config, forced, &[apart[0].batch(), apart[1].batch()]);
    assert_close(&together, &one_by_one, 1e-12, "packed");
}

#[test]
fn a_gradient_is_the_slope_of_the_loss() {
    use crate::support::model::{gradients, plan_f64, read, session_f64, write};
    let config = config(true);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let plan = plan_f64(&config, n, Forced { chunk_tokens: Some(16), ..plain(n, &config) });
    let mut session = session_f64(&config, &plan, 11);
    let (_, grads) = gradients(&mut session, &[tokens.batch()]);
    for (parameter, (name, grad)) in session.weights().into_iter().zip(&grads) {
        let at = (grad.len() / 2 + 3) % grad.len();
        let mut values = read(&mut session.backend, parameter.tensor);
        let original = values[at];
        let mut loss_at = |value: f64| {
            values[at] = value;
            write(&mut session.backend, parameter.tensor, &values);
            session.evaluate([tokens.batch()]).unwrap().mean_loss()
        };
        let step = 1e-5;
        let slope = (loss_at(original + step) - loss_at(original - step)) / (2.0 * step);
        loss_at(original);
        assert!((slope - grad[at]).abs() <= 1e-7 * slope.abs().max(1e-2), "{name}[{at}]: {} against {slope}", grad[at]);
    }
}
