//! Requests to make a job: what they become, and the exact complaint about every value that cannot be used.

use longhaul::{
    bench::shapes,
    domain::{
        JobRequest, Machine, TrainingSpec,
        machine::DeviceKind,
        training::{LongDocuments, Moments, Precision, Schedule},
    },
};
use serde_json::{Value, json};

use crate::support::model::{gpu, machine};

/// A body that is in order, with `changes` laid over it. A change of null removes nothing: null is absence.
fn body(changes: Value) -> Value {
    let mut body = json!({"model": "tiny", "training_file": "file-abc"});
    for (key, value) in changes.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn training(fields: Value) -> TrainingSpec {
    JobRequest::read(&body(json!({"training": fields}))).unwrap().training
}

#[test]
fn defaults_are_the_documented_ones() {
    let request = JobRequest::read(&body(json!({}))).unwrap();
    assert_eq!(request.training, TrainingSpec::default());
    assert!(!request.seed_given);
    assert_eq!((request.suffix, request.metadata), (None, None));
    let nulls = json!({"validation_file": null, "suffix": null, "seed": null, "metadata": null, "method": null,
        "hyperparameters": null, "integrations": null, "training": null});
    assert_eq!(JobRequest::read(&body(nulls)).unwrap().training, TrainingSpec::default());
}

#[test]
fn every_field_of_training_arrives() {
    let spec = training(json!({
        "sequence_length": 4096, "long_documents": "split", "packing": false, "max_steps": 7,
        "gradient_accumulation_steps": 3, "learning_rate": 2e-4, "schedule": "linear", "warmup_steps": 5,
        "min_lr_ratio": 0.0, "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "max_grad_norm": 0,
        "checkpoint_interval": 2, "seed": 42, "precision": "bf16", "moments": "bf16",
        "sequence_parallel_size": 4, "data_parallel_size": 3, "device": "cpu",
    }));
    let expected = TrainingSpec {
        sequence_length: Some(4096),
        long_documents: LongDocuments::Split,
        packing: false,
        n_epochs: None,
        max_steps: Some(7),
        gradient_accumulation_steps: 3,
        learning_rate: 2e-4,
        schedule: Schedule::Linear,
        warmup_steps: 5,
        min_lr_ratio: 0.0,
        weight_decay: 0.0,
        beta1: 0.8,
        beta2: 0.99,
        epsilon: 1e-6,
        max_grad_norm: 0.0,
        checkpoint_interval: Some(2),
        evaluation_interval: None,
        seed: 42,
        precision: Some(Precision::Bf16),
        moments: Moments::Bf16,
        sequence_parallel_size: Some(4),
        data_parallel_size: Some(3),
        device: Some(DeviceKind::Cpu),
    };
    assert_eq!(spec, expected);
    let request = body(json!({"validation_file": "file-v", "training": {"evaluation_interval": 9, "n_epochs": 4}}));
    let spec = JobRequest::read(&request).unwrap().training;
    assert_eq!((spec.evaluation_interval, spec.n_epochs), (Some(9), Some(4)));
}

#[test]
fn openai_hyperparameters_arrive_by_both_doors() {
    let numbers = json!({"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2.5});
    for request in [
        json!({"method": {"type": "supervised", "supervised": {"hyperparameters": numbers}}}),
        json!({"hyperparameters": numbers}),
        json!({"method": {"type": "supervised"}, "hyperparameters": numbers}),
    ] {
        let spec = JobRequest::read(&body(request)).unwrap().training;
        assert_eq!((spec.n_epochs, spec.gradient_accumulation_steps), (Some(3), 4));
        assert!((spec.learning_rate - 2.5e-5).abs() < 1e-18);
    }
    let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
    let spec =
        JobRequest::read(&body(json!({"hyperparameters": auto, "training": {"max_steps": 3}}))).unwrap().training;
    assert_eq!((spec.n_epochs, spec.max_steps, spec.learning_rate), (None, Some(3), 1e-5));
}

#[test]
fn files_come_in_the_order_of_the_request() {
    let request = JobRequest::read(&body(json!({
        "validation_file": "file-v1",
        "training": {"additional_training_files": ["file-b", "file-c"], "additional_validation_files": ["file-v2"]},
    })))
    .unwrap();
    let names = |files: &[longhaul::domain::job_request::FileRef]| -> Vec<String> {
        files.iter().map(|f| format!("{} {}", f.param, f.id)).collect()
    };
    assert_eq!(
        names(&request.training_files),
        [
            "training_file file-abc",
            "training.additional_training_files[0] file-b",
            "training.additional_training_files[1] file-c"
        ]
    );
    assert_eq!(
        names(&request.validation_files),
        ["validation_file file-v1", "training.additional_validation_files[0] file-v2"]
    );
}

/// Values that no number of `training` takes, whatever its range.
fn never_numbers() -> Vec<Value> {
    vec![json!("3"), json!("auto"), json!(true), json!([1]), json!({}), json!(-1), json!(1e300)]
}

#[test]
fn impossible_numbers_are_refused_in_every_field_of_training() {
    let whole = [
        "sequence_length",
        "n_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "sequence_parallel_size",
        "data_parallel_size",
        "warmup_steps",
        "priority",
        "checkpoint_interval",
        "evaluation_interval",
        "seed",
    ];
    let real = ["learning_rate", "min_lr_ratio", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"];
    let mut cases: Vec<(&str, Value)> = Vec::new();
    for field in whole {
        cases.extend(never_numbers().into_iter().map(|value| (field, value)));
        cases.push((field, json!(1.5)));
        cases.push((field, json!(u64::MAX)));
    }
    for field in real {
        cases.extend(never_numbers().into_iter().map(|value| (field, value)));
    }
    for field in [
        "sequence_length",
        "n_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "sequence_parallel_size",
        "data_parallel_size",
        "checkpoint_interval",
        "evaluation_interval",
        "learning_rate",
        "epsilon",
    ] {
        cases.push((field, json!(0)));
    }
    cases.extend([
        ("sequence_length", json!(1)),
        ("sequence_length", json!((1u64 << 30) + 1)),
        ("n_epochs", json!(1001)),
        ("gradient_accumulation_steps", json!(65_537)),
        ("sequence_parallel_size", json!(129)),
        ("data_parallel_size", json!(1025)),
        // A step of one sequence has nothing for a second replica.
        ("data_parallel_size", json!(2)),
        ("seed", json!(2_147_483_648u64)),
        ("learning_rate", json!(10.1)),
        ("min_lr_ratio", json!(1.01)),
        ("weight_decay", json!(10.1)),
        ("beta1", json!(1)),
        ("beta2", json!(1)),
        ("epsilon", json!(1.1)),
        ("max_grad_norm", json!(1.1e9)),
        ("packing", json!("yes")),
        ("packing", json!(1)),
        ("long_documents", json!("drop")),
        ("long_documents", json!(1)),
        ("schedule", json!("step")),
        ("precision", json!("fp8")),
        ("moments", json!("f16")),
        ("device", json!("tpu")),
        ("device", json!(["cpu"])),
    ]);
    for (field, value) in cases {
        let request = body(json!({"validation_file": "file-v", "training": {field: value}}));
        let refused = JobRequest::read(&request).expect_err(&format!("{field}: {value}"));
        assert_eq!(refused.param, format!("training.{field}"), "{value}: {refused}");
        assert!(refused.message.starts_with(&refused.param), "{}", refused.message);
        assert!(refused.message.contains("must"), "{field}: {value}: the way out is missing: {}", refused.message);
    }
}

#[test]
fn precision_and_device_must_go_together() {
    let read = |training: Value| JobRequest::read(&body(json!({"training": training})));
    let refused = read(json!({"precision": "f32", "device": "cuda"})).expect_err("a GPU trains in bf16");
    assert_eq!(refused.param, "training.precision");
    assert!(refused.message.starts_with("training.precision must be bf16"), "{refused}");
    for (training, wanted, on_cpu, on_cuda) in [
        (json!({}), None, Precision::F32, Precision::Bf16),
        (json!({"device": "cuda"}), Some(DeviceKind::Cuda), Precision::F32, Precision::Bf16),
        (json!({"precision": "f32"}), Some(DeviceKind::Cpu), Precision::F32, Precision::F32),
        (json!({"precision": "bf16"}), None, Precision::Bf16, Precision::Bf16),
    ] {
        let spec = read(training.clone()).unwrap().training;
        assert_eq!(spec.wanted_device(), wanted, "{training}");
        assert_eq!(spec.precision_on(DeviceKind::Cpu), on_cpu, "{training}");
        assert_eq!(spec.precision_on(DeviceKind::Cuda), on_cuda, "{training}");
    }
}

#[test]
fn ranks_must_divide_the_heads_and_replicas_the_sequences() {
    let read = |training: Value| JobRequest::read(&body(json!({"training": training})));
    let model = shapes::named("llama-3.1-8b").unwrap();
    for (size, names) in [
        (3, Some("32 query heads of the model: one of 1, 2, 4, 8, 16, 32, not 3")),
        (64, Some("not 64")),
        (1, None),
        (32, None),
    ] {
        let spec = read(json!({"sequence_parallel_size": size, "device": "cuda"})).unwrap().training;
        let refused = spec.check_ranks(&model).err();
        assert_eq!(refused.is_some(), names.is_some(), "{size}");
        if let (Some(refused), Some(names)) = (refused, names) {
            assert_eq!(refused.param, "training.sequence_parallel_size");
            assert!(refused.message.contains(names), "{refused}");
        }
    }
    let replicas = |n: u32, of: u32| read(json!({"data_parallel_size": n, "gradient_accumulation_steps": of}));
    for (n, of) in [(1, 1), (2, 4), (4, 4), (3, 6)] {
        assert_eq!(replicas(n, of).unwrap().training.data_parallel_size, Some(n));
    }
    for (n, of) in [(3, 4), (8, 4), (2, 1)] {
        let refused = replicas(n, of).expect_err("replicas take equal shares");
        assert_eq!(refused.param, "training.data_parallel_size");
        assert!(refused.message.contains("gradient_accumulation_steps"), "{refused}");
    }
}

/// Each rank has a GPU; on the CPU they share the cores.
#[test]
fn no_more_ranks_are_taken_than_there_are_gpus() {
    let model = shapes::named("llama-3.1-8b").unwrap();
    let two = Machine { n_devices: 2, ..gpu(1 << 30) };
    let spec = |sequence_parallel_size, data_parallel_size| TrainingSpec {
        sequence_parallel_size,
        data_parallel_size,
        gradient_accumulation_steps: 4,
        ..TrainingSpec::default()
    };
    for (sequence, data) in [(None, None), (Some(2), None), (None, Some(2)), (Some(1), Some(2))] {
        assert_eq!(spec(sequence, data).check_devices(&model, &two), Ok(()), "{sequence:?} x {data:?}");
    }
    for (sequence, data, param, names) in [
        (Some(4), None, "sequence_parallel_size", "4 are asked for, and 2 of a kind are there: take one of 1, 2,"),
        (Some(2), Some(2), "sequence_parallel_size", "take one of 1,"),
        (None, Some(4), "data_parallel_size", "take one of 1, 2,"),
    ] {
        let refused = spec(sequence, data).check_devices(&model, &two).unwrap_err();
        assert_eq!(refused.param, format!("training.{param}"));
        assert!(refused.message.contains(names), "{refused}");
        assert_eq!(spec(sequence, data).check_devices(&model, &machine(1 << 30)), Ok(()), "the CPU has cores");
    }
}

/// Jobs that were made before the fields were.
#[test]
fn a_stored_job_without_ranks_leaves_them_open() {
    let mut stored = serde_json::to_value(TrainingSpec::default()).unwrap();
    for field in ["sequence_parallel_size", "data_parallel_size"] {
        assert_eq!(stored.as_object_mut().unwrap().remove(field), Some(Value::Null));
    }
    assert_eq!(serde_json::from_value::<TrainingSpec>(stored).unwrap(), TrainingSpec::default());
}

#[test]
fn every_other_bad_value_is_refused_by_its_path() {
    let supervised =
        |numbers: Value| json!({"method": {"type": "supervised", "supervised": {"hyperparameters": numbers}}});
    let path = |name: &str| format!("method.supervised.hyperparameters.{name}");
    let long = "x".repeat(65);
    let many: serde_json::Map<_, _> = (0..17).map(|i| (format!("k{i}"), json!("v"))).collect();
    let cases: Vec<(Value, String, &str)> = vec![
        (json!({"model": ""}), "model".into(), "invalid_value"),
        (json!({"model": 7}), "model".into(), "invalid_value"),
        (json!({"model": null}), "model".into(), "missing_required_parameter"),
        (json!({"model": "a\u{0}b"}), "model".into(), "invalid_value"),
        (json!({"training_file": null}), "training_file".into(), "missing_required_parameter"),
        (json!({"training_file": "notes.txt"}), "training_file".into(), "file_not_found"),
        (json!({"training_file": "file-../../etc"}), "training_file".into(), "file_not_found"),
        (json!({"training_file": ["file-abc"]}), "training_file".into(), "invalid_value"),
        (json!({"validation_file": 3}), "validation_file".into(), "invalid_value"),
        (json!({"suffix": ""}), "suffix".into(), "invalid_value"),
        (json!({"suffix": long}), "suffix".into(), "invalid_value"),
        (json!({"suffix": "a:b"}), "suffix".into(), "invalid_value"),
        (json!({"suffix": "a/b"}), "suffix".into(), "invalid_value"),
        (json!({"seed": -1}), "seed".into(), "invalid_value"),
        (json!({"seed": 2_147_483_648u64}), "seed".into(), "invalid_value"),
        (json!({"seed": "7"}), "seed".into(), "invalid_value"),
        (json!({"metadata": []}), "metadata".into(), "invalid_value"),
        (json!({"metadata": {"k": 1}}), "metadata.k".into(), "invalid_value"),
        (json!({"metadata": {"k": null}}), "metadata.k".into(), "invalid_value"),
        (json!({"metadata": {"": "v"}}), "metadata".into(), "invalid_value"),
        (json!({"metadata": {long.as_str(): "v"}}), "metadata".into(), "invalid_value"),
        (json!({"metadata": {"k": "v".repeat(513)}}), "metadata.k".into(), "invalid_value"),
        (json!({"metadata": {"k": "a\u{0}"}}), "metadata.k".into(), "invalid_value"),
        (json!({"metadata": many}), "metadata".into(), "invalid_value"),
        (json!({"integrations": [{"type": "wandb"}]}), "integrations".into(), "unsupported_parameter"),
        (json!({"integrations": {}}), "integrations".into(), "invalid_value"),
        (json!({"trainning": {}}), "trainning".into(), "unknown_parameter"),
        (json!({"training": []}), "training".into(), "invalid_value"),
        (json!({"training": {"lr": 1}}), "training.lr".into(), "unknown_parameter"),
        (
            json!({"training": {"additional_training_files": "file-b"}}),
            "training.additional_training_files".into(),
            "invalid_value",
        ),
        (
            json!({"training": {"additional_training_files": [3]}}),
            "training.additional_training_files[0]".into(),
            "invalid_value",
        ),
        (
            json!({"training": {"additional_training_files": ["file-b", "x"]}}),
            "training.additional_training_files[1]".into(),
            "file_not_found",
        ),
        (
            json!({"training": {"additional_training_files": ["file-abc"]}}),
            "training.additional_training_files[0]".into(),
            "invalid_value",
        ),
        (
            json!({"training": {"additional_training_files": vec!["file-b"; 1001]}}),
            "training.additional_training_files".into(),
            "invalid_value",
        ),
        (
            json!({"training": {"additional_validation_files": ["file-b"]}}),
            "training.additional_validation_files".into(),
            "invalid_value",
        ),
        (json!({"training": {"evaluation_interval": 5}}), "training.evaluation_interval".into(), "invalid_value"),
        (json!({"training": {"n_epochs": 2, "max_steps": 5}}), "training.max_steps".into(), "invalid_value"),
        (json!({"method": "supervised"}), "method".into(), "invalid_value"),
        (json!({"method": {"type": "dpo", "dpo": {}}}), "method.type".into(), "unsupported_method"),
        (json!({"method": {"type": "reinforcement"}}), "method.type".into(), "unsupported_method"),
        (json!({"method": {"type": "magic"}}), "method.type".into(), "invalid_value"),
        (json!({"method": {"type": "supervised", "dpo": {}}}), "method.dpo".into(), "unknown_parameter"),
        (supervised(json!({"n_epochs": 0})), path("n_epochs"), "invalid_value"),
        (supervised(json!({"n_epochs": "many"})), path("n_epochs"), "invalid_value"),
        (supervised(json!({"n_epochs": 1.5})), path("n_epochs"), "invalid_value"),
        (supervised(json!({"batch_size": 0})), path("batch_size"), "invalid_value"),
        (supervised(json!({"batch_size": 65_537})), path("batch_size"), "invalid_value"),
        (supervised(json!({"learning_rate_multiplier": 0})), path("learning_rate_multiplier"), "invalid_value"),
        (supervised(json!({"learning_rate_multiplier": -1})), path("learning_rate_multiplier"), "invalid_value"),
        (supervised(json!({"learning_rate_multiplier": 1e7})), path("learning_rate_multiplier"), "invalid_value"),
        (supervised(json!({"beta": 0.1})), path("beta"), "unknown_parameter"),
        (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs".into(), "invalid_value"),
        (json!({"hyperparameters": 3}), "hyperparameters".into(), "invalid_value"),
    ];
    for (changes, param, code) in cases {
        let refused = JobRequest::read(&body(changes.clone())).expect_err(&changes.to_string());
        assert_eq!((refused.param.as_str(), refused.code.as_str()), (param.as_str(), code), "{changes}: {refused}");
    }
    for other in [json!([]), json!("x"), json!(null), json!(3)] {
        assert_eq!(JobRequest::read(&other).unwrap_err().param, "body");
    }
}

/// A thing said in two places must agree.
#[test]
fn contradictions_are_refused_and_agreement_is_not() {
    let both = |numbers: Value, training: Value| {
        JobRequest::read(&body(json!({"hyperparameters": numbers, "training": training})))
    };
    for (numbers, training, param) in [
        (json!({"n_epochs": 2}), json!({"n_epochs": 3}), "training.n_epochs"),
        (json!({"n_epochs": 2}), json!({"max_steps": 3}), "training.max_steps"),
        (json!({"batch_size": 2}), json!({"gradient_accumulation_steps": 3}), "training.gradient_accumulation_steps"),
        (json!({"learning_rate_multiplier": 2}), json!({"learning_rate": 1e-3}), "training.learning_rate"),
    ] {
        assert_eq!(both(numbers, training).unwrap_err().param, param);
    }
    assert!(
        both(json!({"n_epochs": 3, "batch_size": 2}), json!({"n_epochs": 3, "gradient_accumulation_steps": 2})).is_ok()
    );
    let seeds = |a: u64, b: u64| JobRequest::read(&body(json!({"seed": a, "training": {"seed": b}})));
    assert_eq!(seeds(1, 2).unwrap_err().param, "training.seed");
    assert_eq!(seeds(5, 5).unwrap().training.seed, 5);
    let doors = json!({"hyperparameters": {"n_epochs": 2}, "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}});
    assert_eq!(JobRequest::read(&body(doors)).unwrap_err().param, "hyperparameters");
}
