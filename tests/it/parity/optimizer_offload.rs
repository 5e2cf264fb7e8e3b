//! State in host memory, through the device in pieces of any size == state on the device, bit for bit.

use longhaul::{
    domain::training::{Moments, Precision},
    engine::{
        backend::{AdamW, Backend, Tensor, cpu::Cpu},
        train::session::Session,
    },
    plan::{self, Forced, Plan},
};

use super::{documents, plain};
use crate::support::model::{config, machine, write};

/// Bytes of weights, moments and low halves after three steps.
fn trained(moments: Moments, forced: Forced) -> (Plan, Vec<u8>) {
    let config = config(false);
    let tokens = documents(&config);
    let n = tokens.ids.len() as u64;
    let machine = machine(1 << 32);
    let forced = plain_with(n, forced);
    let request = plan::Request {
        model: &config,
        precision: Precision::Bf16,
        moments,
        tokens: n,
        micro_batches: 1,
        machine: &machine,
        forced,
    };
    let plan = plan::plan(&request).expect("a small model fits");
    let mut session = Session::new(Cpu::<half::bf16>::new(2).unwrap(), &plan, &config, &std::env::temp_dir()).unwrap();
    for (i, parameter) in session.weights().into_iter().enumerate() {
        let values: Vec<f64> =
            (0..parameter.tensor.elements()).map(|j| 0.1 * ((i + 7) as f64 * j as f64).sin()).collect();
        write(&mut session.backend, parameter.tensor, &values);
    }
    let low = session.optimizer().low.expect("bf16 weights have masters");
    for half in [low.host, low.device] {
        session.backend.fill(half, 0.0).unwrap();
    }
    for step in 1..=3 {
        let hyper = AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
            seed: 5,
            first_index: 0,
        };
        session.step(&[tokens.batch()], &hyper, 1.0).unwrap();
    }
    let state = *session.optimizer();
    let mut all: Vec<Tensor> = session.weights().into_iter().map(|parameter| parameter.tensor).collect();
    all.extend([state.m, state.v, low].into_iter().flat_map(|split| [split.host, split.device]));
    let mut bytes = Vec::new();
    for tensor in all {
        let start = bytes.len();
        bytes.resize(start + tensor.bytes() as usize, 0);
        session.backend.download(tensor, &mut bytes[start..]).unwrap();
    }
    (plan, bytes)
}

/// The plain choices of these documents with the given places of the state.
fn plain_with(n: u64, forced: Forced) -> Forced {
    Forced {
        optimizer_host_elements: forced.optimizer_host_elements,
        staged_elements: forced.staged_elements,
        weights_host_layers: forced.weights_host_layers,
        ..plain(n, &config(false))
    }
}

#[test]
fn state_in_host_memory_is_state_on_the_device() {
    let n = config(false).n_params();
    for moments in [Moments::F32, Moments::Bf16] {
        let (_, resident) = trained(moments, Forced { optimizer_host_elements: Some(0), ..Forced::default() });
        for (hosted, staged) in [(1, 8), (100, 7), (n / 2, 1000), (n - 1, n), (n, 4097)] {
            let forced =
                Forced { optimizer_host_elements: Some(hosted), staged_elements: Some(staged), ..Forced::default() };
            let (plan, bytes) = trained(moments, forced);
            assert_eq!(plan.choice.weights_host_layers, 0);
            let state = if moments == Moments::F32 { 10 } else { 6 };
            assert!(plan.layout.host_bytes >= hosted * state, "{} bytes for {hosted}", plan.layout.host_bytes);
            assert!(bytes == resident, "{hosted} of {n} in host memory, {staged} at once, {moments:?}");
        }
    }
}

#[test]
fn weights_in_host_memory_are_updated_like_those_on_the_device() {
    let config = config(false);
    let (n, outside) = (config.n_params(), config.vocab_size * config.hidden_size);
    let (_, resident) = trained(Moments::F32, Forced { optimizer_host_elements: Some(0), ..Forced::default() });
    for (layers, hosted, staged) in [
        (1, outside + config.layer_params(), 4097),
        (3, n - 7, 1000),
        (config.n_layers, n, n),
        (config.n_layers, outside + config.n_layers * config.layer_params(), 300),
    ] {
        let forced = Forced {
            optimizer_host_elements: Some(hosted),
            staged_elements: Some(staged),
            weights_host_layers: Some(layers),
            ..Forced::default()
        };
        let (plan, bytes) = trained(Moments::F32, forced);
        assert_eq!(plan.choice.weights_host_layers, layers);
        assert!(bytes == resident, "weights of {layers} layers in host memory, {staged} at once");
    }
}
