//! The planner: what it lays out, what it chooses, what it refuses.

mod ranks;
mod traffic;

use longhaul::{
    bench::shapes,
    domain::{
        ModelConfig,
        training::{Moments, Precision},
    },
    plan::{self, Forced, Place, Request, Slot, layout::Category},
};

use crate::support::model::machine;

const GIB: u64 = 1 << 30;

fn request<'a>(model: &'a ModelConfig, machine: &'a longhaul::domain::Machine, tokens: u64) -> Request<'a> {
    let (precision, moments) = (Precision::F32, Moments::F32);
    Request { model, precision, moments, tokens, micro_batches: 1, machine, forced: Forced::default() }
}

#[test]
fn regions_lie_apart_and_the_ledger_is_the_arena() {
    let model = shapes::named("10m").unwrap();
    for tokens in [128, 2048, 10_000] {
        let machine = machine(8 * GIB);
        let plan = plan::plan(&request(&model, &machine, tokens)).unwrap();
        let loss = [Slot::LossNorm, Slot::Logits, Slot::DLossNorm];
        for (i, a) in plan.layout.regions.iter().enumerate() {
            assert_eq!(a.offset % 256, 0);
            assert!(a.offset + a.bytes <= plan.layout.bytes);
            for b in &plan.layout.regions[i + 1..] {
                let overlaid = loss.contains(&a.slot) != loss.contains(&b.slot)
                    && a.category == Category::Work
                    && b.category == Category::Work;
                let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                assert!(apart || overlaid, "{a:?} over {b:?}");
            }
        }
        assert_eq!(plan.ledger.iter().map(|(_, bytes)| bytes).sum::<u64>(), plan.layout.bytes);
    }
}

#[test]
fn a_token_costs_the_streamed_layer_and_its_slots() {
    // x and dy of h, K and V of nk d, dK and dV of nk d in f32, slots of h, angles of d, three int32: nothing else may grow.
    let model = shapes::named("llama-3.1-8b").unwrap();
    let machine = machine(4096 * GIB);
    let forced = Forced {
        chunk_tokens: Some(8192),
        checkpoint_slots: Some(7),
        place: Some(Place::Memory),
        kept_attention_layers: Some(0),
        kept_qkv_layers: Some(0),
        kept_gate_up_layers: Some(0),
        gradients: Some(plan::Gradients::Wide),
        ..Forced::default()
    };
    let bytes = |tokens| {
        let request = Request { precision: Precision::Bf16, forced, ..request(&model, &machine, tokens) };
        plan::plan(&request).unwrap().layout.bytes
    };
    let per_token = (bytes(1 << 20) - bytes(1 << 19)) as f64 / f64::from(1 << 19);
    let streamed = 2.0 * 8192.0 + 2.0 * 2048.0 + 2.0 * 4096.0;
    assert_eq!(streamed / 1024.0, 28.0);
    assert_eq!(per_token, streamed + 7.0 * 8192.0 + 4.0 * 128.0 + 12.0);
}

#[test]
fn more_memory_is_never_slower_and_always_within() {
    let model = shapes::named("10m").unwrap();
    let mut last = f64::INFINITY;
    for mib in [400, 500, 700, 1000, 2000, 8000] {
        let machine = machine(mib << 20);
        let plan = plan::plan(&request(&model, &machine, 8192)).unwrap();
        assert!(plan.predicted_peak_bytes <= machine.device_bytes);
        assert!(plan.step_seconds <= last, "{mib} MiB: {} after {last}", plan.step_seconds);
        last = plan.step_seconds;
    }
    let roomy = machine(64 * GIB);
    let choice = plan::plan(&request(&model, &roomy, 8192)).unwrap().choice;
    assert_eq!(choice.segment_starts, (0..model.n_layers).collect::<Vec<_>>(), "nothing is re-run where all fits");
    assert_eq!(
        (choice.kept_attention_layers, choice.kept_qkv_layers, choice.kept_gate_up_layers),
        (model.n_layers, model.n_layers, model.n_layers)
    );
}

#[test]
fn a_refusal_names_the_longest_that_fits() {
    let model = shapes::named("10m").unwrap();
    let machine = machine(GIB);
    let refused = plan::plan(&request(&model, &machine, 4_000_000)).unwrap_err();
    let longest = refused.longest_tokens;
    assert!(longest > 10_000 && longest < 4_000_000, "{longest}");
    assert!(plan::plan(&request(&model, &machine, longest)).is_ok());
    assert!(plan::plan(&request(&model, &machine, longest + 128)).is_err());
    assert!(refused.to_string().contains(&format!("the longest sequence that fits is {longest} tokens")));
    assert_eq!(refused.wall, "host memory");

    let big = shapes::named("llama-3.1-8b").unwrap();
    let refused = plan::plan(&request(&big, &machine, 128)).unwrap_err();
    assert_eq!(refused.longest_tokens, 0);
    assert!(refused.to_string().contains("smaller model"), "{refused}");
}

#[test]
fn inputs_go_to_disk_where_memory_cannot_hold_them() {
    let model = shapes::named("10m").unwrap();
    let forced = Forced { place: Some(Place::Memory), ..Forced::default() };
    let small = machine(400 << 20);
    let in_memory = plan::longest(&Request { forced, ..request(&model, &small, 128) });
    let anywhere = plan::longest(&request(&model, &small, 128));
    assert!(anywhere > in_memory, "{anywhere} against {in_memory}");
    let plan = plan::plan(&request(&model, &small, anywhere)).unwrap();
    assert_eq!(plan.choice.checkpoint_place, Place::Disk);
    assert!(plan.disk_bytes > 0 && plan.disk_bytes <= small.disk_bytes);
}

#[test]
fn one_wall_may_be_the_disk() {
    let model = shapes::named("10m").unwrap();
    let mut small = machine(400 << 20);
    small.disk_bytes = 0;
    let without = plan::longest(&request(&model, &small, 128));
    small.disk_bytes = 1 << 30;
    assert!(plan::longest(&request(&model, &small, 128)) > without);
}

/// An H200 with this much host memory.
fn hopper(host_gib: u64) -> longhaul::domain::Machine {
    let rates = longhaul::domain::machine::Rates {
        gemm_flops: 730e12,
        attention_flops: 530e12,
        memory_bytes: 3.6e12,
        link_bytes: 50e9,
        peer_bytes: 250e9,
        ..machine(0).rates
    };
    longhaul::domain::Machine {
        device: longhaul::domain::machine::DeviceKind::Cuda,
        device_bytes: 138 * GIB,
        host_bytes: host_gib * GIB,
        rates,
        ..machine(0)
    }
}

#[test]
fn host_memory_carries_what_a_gpu_cannot() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    let of = |host_gib, moments, tokens| {
        let machine = hopper(host_gib);
        let plan = plan::plan(&Request { precision: Precision::Bf16, moments, ..request(&model, &machine, tokens) });
        if let Ok(plan) = &plan {
            assert!(plan.predicted_peak_bytes <= machine.device_bytes);
            assert!(plan.predicted_host_peak_bytes <= machine.host_bytes);
            assert_eq!(plan.host_ledger.iter().map(|(_, bytes)| bytes).sum::<u64>(), plan.layout.host_bytes);
        }
        plan
    };
    // With one GPU and 128 GiB beside it, less a tenth for others.
    assert!(of(113, Moments::F32, 1_500_000).is_ok());
    assert!(of(113, Moments::Bf16, 2_000_000).is_ok());
    let refused = of(113, Moments::F32, 2_600_000).unwrap_err();
    let longest = refused.longest_tokens;
    assert!((1_500_000..2_600_000).contains(&longest), "{longest}");
    assert!(of(113, Moments::F32, longest).is_ok() && of(113, Moments::F32, longest + 128).is_err());
    // At 128K the attention of all layers is kept on the device because layer inputs are not.
    let plan = of(113, Moments::F32, 131_072).unwrap();
    assert_eq!(plan.choice.kept_attention_layers, model.n_layers);
    assert!(plan.choice.checkpoint_host_rows > 0 && plan.choice.optimizer_host_elements < model.n_params() / 4);
    // With next to no host memory less is kept and it takes longer.
    let alone = of(2, Moments::F32, 131_072).unwrap();
    assert!(alone.step_seconds > plan.step_seconds && alone.choice.kept_attention_layers < model.n_layers);
}
