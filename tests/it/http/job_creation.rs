//! Making jobs: what is echoed, what is refused and by which field, and that a repeated request makes one job.

use std::time::Duration;

use longhaul::{
    domain::{ExecutorId, Machine},
    store::{
        hosts::NewHost,
        queue::{ANY_DEVICE, Claimant, Work},
    },
};
use serde_json::{Value, json};

use crate::support::{
    model::{gpu, machine},
    rows::{LONG, claim},
    service::{Service, body},
};

const JOBS: &str = "/v1/fine_tuning/jobs";
const GIB: u64 = 1 << 30;

#[tokio::test]
async fn a_job_echoes_what_was_asked_with_every_default_filled_in() {
    let service = Service::new("create").await;
    service.host(GIB).await;
    let (first, second) = (service.upload("a.txt", b"one").await, service.upload("b.jsonl", b"{}").await);
    let valid = service.upload("v.md", b"three").await;
    let asked = json!({
        "model": "tiny", "training_file": first, "validation_file": valid, "suffix": "my-run.1", "seed": 42,
        "metadata": {"team": "blue", "note": ""}, "integrations": [],
        "method": {"type": "supervised", "supervised": {"hyperparameters":
            {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}}},
        "training": {"sequence_length": 256, "long_documents": "split", "schedule": "linear", "warmup_steps": 4,
            "additional_training_files": [second], "evaluation_interval": 5, "priority": 7},
    });
    let job = service.post(JOBS, &asked).await.json();
    let numbers = json!({"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5});
    for (field, expected) in [
        ("object", json!("fine_tuning.job")),
        ("model", json!("tiny")),
        ("training_file", json!(first)),
        ("validation_file", json!(valid)),
        ("status", json!("validating_files")),
        ("hyperparameters", numbers.clone()),
        ("method", json!({"type": "supervised", "supervised": {"hyperparameters": numbers}})),
        ("seed", json!(42)),
        ("metadata", json!({"team": "blue", "note": ""})),
        ("user_provided_suffix", json!("my-run.1")),
        ("error", Value::Null),
        ("fine_tuned_model", Value::Null),
        ("finished_at", Value::Null),
        ("trained_tokens", Value::Null),
        ("estimated_finish", Value::Null),
        ("result_files", json!([])),
        ("integrations", json!([])),
    ] {
        assert_eq!(job[field], expected, "{field}");
        assert!(job.get(field).is_some(), "{field} is always there");
    }
    let training = &job["training"];
    for (field, expected) in [
        ("sequence_length", json!(256)),
        ("long_documents", json!("split")),
        ("schedule", json!("linear")),
        ("warmup_steps", json!(4)),
        ("n_epochs", json!(3)),
        ("gradient_accumulation_steps", json!(2)),
        ("learning_rate", json!(5e-6)),
        ("weight_decay", json!(0.1)),
        ("beta2", json!(0.95)),
        ("precision", Value::Null),
        ("device", Value::Null),
        ("packing", json!(true)),
        ("seed", json!(42)),
        ("additional_training_files", json!([second])),
        ("priority", json!(7)),
        ("additional_validation_files", json!([])),
    ] {
        assert_eq!(training[field], expected, "training.{field}");
    }
    let path = format!("{JOBS}/{}", job["id"].as_str().unwrap());
    assert_eq!(service.get(&path).await.json(), job);

    let seeds: Vec<Value> =
        [service.job(json!({})).await, service.job(json!({})).await].map(|j| j["seed"].clone()).into();
    assert!(seeds.iter().all(|seed| seed.as_u64().is_some_and(|seed| seed < 1 << 31)), "{seeds:?}");
    assert_ne!(seeds[0], seeds[1], "a seed is drawn where none is given");
}

#[tokio::test]
async fn every_number_of_training_out_of_range_is_told_by_its_path() {
    let service = Service::new("numbers").await;
    let file = service.upload("a.txt", b"text").await;
    let whole: [(&str, u64, u64); 10] = [
        ("sequence_length", 2, 1 << 30),
        ("n_epochs", 1, 1000),
        ("max_steps", 1, 100_000_000),
        ("gradient_accumulation_steps", 1, 65_536),
        ("sequence_parallel_size", 1, 128),
        ("data_parallel_size", 1, 1024),
        ("warmup_steps", 0, 100_000_000),
        ("checkpoint_interval", 1, 100_000_000),
        ("evaluation_interval", 1, 100_000_000),
        ("seed", 0, i32::MAX as u64),
    ];
    let real: [(&str, Value); 7] = [
        ("learning_rate", json!(10.1)),
        ("min_lr_ratio", json!(1.1)),
        ("weight_decay", json!(10.1)),
        ("beta1", json!(1)),
        ("beta2", json!(1)),
        ("epsilon", json!(1.1)),
        ("max_grad_norm", json!(1.1e9)),
    ];
    let mut cases: Vec<(&str, Value)> = Vec::new();
    for (field, low, high) in whole {
        cases.extend([json!(high + 1), json!(1.5), json!(-1), json!(u64::MAX)].map(|bad| (field, bad)));
        if low > 0 {
            cases.push((field, json!(low - 1)));
        }
    }
    for (field, high) in real {
        cases.extend([high, json!(-1e-9), json!(1e300)].map(|bad| (field, bad)));
    }
    let fields: Vec<&str> = whole.iter().map(|w| w.0).chain(["learning_rate", "beta1", "epsilon"]).collect();
    for field in fields {
        cases.extend([json!("3"), json!("auto"), json!(true), json!([1]), json!({})].map(|bad| (field, bad)));
    }
    cases.extend([("learning_rate", json!(0)), ("epsilon", json!(0))]);
    cases.extend(["long_documents", "schedule", "precision", "device", "packing"].map(|field| (field, json!("other"))));
    for (field, bad) in cases {
        let asked = body(&file, json!({"validation_file": null, "training": {field: bad}}));
        let answer = service.post(JOBS, &asked).await;
        let error = answer.error(400, &format!("training.{field}"));
        assert!(error["message"].as_str().unwrap().contains(field), "{bad}: {error}");
    }
    assert_eq!(service.count("jobs").await, 0);
}

#[tokio::test]
async fn other_fields_are_told_by_their_path_too() {
    let service = Service::new("fields").await;
    let file = service.upload("a.txt", b"text").await;
    let hyper = |h: Value| json!({"method": {"type": "supervised", "supervised": {"hyperparameters": h}}});
    let path = "method.supervised.hyperparameters";
    for (changes, param) in [
        (json!({"model": null}), "model"),
        (json!({"model": 7}), "model"),
        (json!({"training_file": null}), "training_file"),
        (json!({"training_file": "file-none"}), "training_file"),
        (json!({"training_file": "../etc"}), "training_file"),
        (json!({"validation_file": "file-none"}), "validation_file"),
        (json!({"training": {"additional_training_files": ["file-none"]}}), "training.additional_training_files[0]"),
        (json!({"suffix": "a:b"}), "suffix"),
        (json!({"suffix": "s".repeat(65)}), "suffix"),
        (json!({"seed": -1}), "seed"),
        (json!({"metadata": {"k": 1}}), "metadata.k"),
        (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
        (json!({"method": {"type": "dpo"}}), "method.type"),
        (hyper(json!({"n_epochs": 0})), &format!("{path}.n_epochs")),
        (hyper(json!({"batch_size": 65_537})), &format!("{path}.batch_size")),
        (hyper(json!({"learning_rate_multiplier": 0})), &format!("{path}.learning_rate_multiplier")),
        (json!({"trainign": {}}), "trainign"),
        (json!({"training": {"sequence_lenght": 5}}), "training.sequence_lenght"),
        (json!({"training": {"evaluation_interval": 5}}), "training.evaluation_interval"),
    ] {
        service.post(JOBS, &body(&file, changes)).await.error(400, param);
    }
    let images = crate::support::form::Form::new().field("purpose", "vision").file("a.txt", b"x").request();
    let image = service.send(images).await.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(service.post(JOBS, &body(&image, json!({}))).await.error(400, "training_file")["code"], "wrong_purpose");
    assert_eq!(service.count("jobs").await, 0);
}

#[tokio::test]
async fn an_unknown_model_is_refused_with_those_there_are() {
    let service = Service::new("unknown").await;
    service.host(GIB).await;
    let file = service.upload("a.txt", b"text").await;
    let error = service.post(JOBS, &body(&file, json!({"model": "gpt-9"}))).await.error(400, "model");
    assert_eq!(error["code"], "model_not_found");
    assert!(error["message"].as_str().unwrap().contains("tiny"), "{error}");
    let error = service.post(JOBS, &body(&file, json!({"model": "broken"}))).await.error(400, "model");
    assert!(error["message"].as_str().unwrap().contains("another family"), "{error}");
    let cuda = body(&file, json!({"training": {"device": "cuda"}}));
    assert_eq!(service.post(JOBS, &cuda).await.error(400, "training.device")["code"], "no_such_device");
}

#[tokio::test]
async fn a_name_of_a_hub_is_judged_by_an_executor_that_may_fetch() {
    let service = Service::new("hub-name").await;
    service.host(GIB).await;
    let file = service.upload("a.txt", b"text").await;
    let ask = async |model: &str| service.post(JOBS, &body(&file, json!({"model": model}))).await;
    assert_eq!(ask("org/model").await.error(400, "model")["code"], "model_not_found", "no host fetches");
    let executor = ExecutorId::random();
    let machines = [machine(GIB)];
    let host =
        NewHost { executor: &executor, hostname: "b", machines: &machines, free: &[], models: &[], fetches: true };
    service.store.publish_host(&host).await.unwrap();
    for name in ["org/model", "org/model.v1@step-4"] {
        let job = ask(name).await.json();
        assert_eq!((&job["status"], &job["model"]), (&"validating_files".into(), &name.into()));
    }
    for name in ["model", "org/../model", "org/model@", "a/b/c"] {
        assert_eq!(ask(name).await.error(400, "model")["code"], "model_not_found", "{name}");
    }
    // Its inspection goes to a host that fetches, and to no other at first.
    assert_eq!(claim(&service.store, Work::Inspect, LONG).await, None);
    let devices = ["cpu".to_owned(), ANY_DEVICE.to_owned()];
    let by = Claimant {
        executor: &executor,
        lease: LONG,
        models: &[],
        fetches: true,
        devices: &devices,
        takes: 1,
        only: None,
    };
    let claimed = service.store.claim_job(Work::Inspect, &by).await.unwrap().unwrap();
    assert_eq!(claimed.model, "org/model");
}

#[tokio::test]
async fn a_job_is_held_against_the_device_that_would_train_it() {
    let service = Service::new("device").await;
    let file = service.upload("a.txt", b"text").await;
    let post = async |training: Value| service.post(JOBS, &body(&file, json!({"training": training}))).await;
    let long = 1 << 24;
    service.host(256 * GIB).await;
    let cuda = json!({"device": "cuda"});
    let error = post(cuda.clone()).await.error(400, "training.device");
    assert!(error["message"].as_str().unwrap().contains("has a GPU"), "{error}");
    post(json!({"sequence_length": long})).await.json();

    // A host with a small GPU beside large memory: who asks for the GPU, or for nothing, is bound by the GPU's memory.
    sqlx::Executor::execute(&mut service.database.connection().await, "DELETE FROM hosts").await.unwrap();
    service.host_with(&[gpu(512 << 20), machine(256 * GIB)]).await;
    let echoed = post(cuda).await.json();
    assert_eq!((&echoed["training"]["device"], &echoed["training"]["precision"]), (&json!("cuda"), &Value::Null));
    for training in [json!({"sequence_length": long}), json!({"sequence_length": long, "device": "cuda"})] {
        let error = post(training).await.error(400, "training.sequence_length");
        assert!(error["message"].as_str().unwrap().contains("device memory"), "{error}");
    }
    post(json!({"sequence_length": long, "device": "cpu"})).await.json();
    let echoed = post(json!({"sequence_length": long, "precision": "f32"})).await.json();
    assert_eq!((&echoed["training"]["device"], &echoed["training"]["precision"]), (&Value::Null, &json!("f32")));
    let error = post(json!({"precision": "f32", "device": "cuda"})).await.error(400, "training.precision");
    assert!(error["message"].as_str().unwrap().contains("bf16"), "{error}");

    let odd = "UPDATE hosts SET models = jsonb_set(models, '{0,config,head_dim}', '12')";
    sqlx::Executor::execute(&mut service.database.connection().await, odd).await.unwrap();
    let error = post(json!({})).await.error(400, "training.device");
    assert!(error["message"].as_str().unwrap().contains("heads of 12"), "{error}");
    post(json!({"device": "cpu"})).await.json();
}

#[tokio::test]
async fn ranks_that_the_model_or_the_device_cannot_have_are_refused() {
    let service = Service::new("ranks").await;
    let file = service.upload("a.txt", b"text").await;
    let post = async |training: Value| service.post(JOBS, &body(&file, json!({"training": training}))).await;
    service.host_with(&[gpu(64 * GIB), machine(64 * GIB)]).await;
    let error = post(json!({"sequence_parallel_size": 4, "device": "cpu"})).await;
    let error = error.error(400, "training.sequence_parallel_size");
    assert!(error["message"].as_str().unwrap().contains("one of 1, 2, 3, 6, not 4"), "{error}");
    // Where nobody says on what, GPUs are what the job would get: two of one kind and one of another.
    let other = Machine { device_name: "Other".into(), ..gpu(64 * GIB) };
    service.host_with(&[gpu(64 * GIB), other, gpu(64 * GIB), machine(64 * GIB)]).await;
    for training in [json!({"sequence_parallel_size": 3}), json!({"sequence_parallel_size": 3, "device": "cuda"})] {
        let error = post(training).await.error(400, "training.sequence_parallel_size");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("2 of a kind are there: take one of 1, 2,"), "{error}");
    }
    let replicas = json!({"data_parallel_size": 4, "gradient_accumulation_steps": 4});
    post(replicas).await.error(400, "training.data_parallel_size");
    assert_eq!(service.count("jobs").await, 0);
    let job = post(json!({"sequence_parallel_size": 2, "device": "cpu"})).await.json();
    assert_eq!(job["training"]["sequence_parallel_size"], 2);
    post(json!({"sequence_parallel_size": 2})).await.json();
    let open = post(json!({})).await.json();
    assert_eq!(open["training"]["sequence_parallel_size"], Value::Null, "left to the planner");
}

#[tokio::test]
async fn hosts_carry_together_what_none_does_alone() {
    let service = Service::new("together").await;
    let file = service.upload("a.txt", b"text").await;
    let post = async |training: Value| service.post(JOBS, &body(&file, json!({"training": training}))).await;
    service.host_with(&[gpu(64 * GIB), gpu(64 * GIB), machine(64 * GIB)]).await;
    let three = json!({"sequence_parallel_size": 3});
    post(three.clone()).await.error(400, "training.sequence_parallel_size");
    // Another kind of GPU is no help; two of the same are.
    let other = Machine { device_name: "Other".into(), ..gpu(64 * GIB) };
    service.host_with(&[other.clone(), other, machine(64 * GIB)]).await;
    post(three.clone()).await.error(400, "training.sequence_parallel_size");
    service.host_with(&[gpu(64 * GIB), gpu(64 * GIB), machine(64 * GIB)]).await;
    post(three).await.json();
    post(json!({"sequence_parallel_size": 6})).await.error(400, "training.sequence_parallel_size");
}

#[tokio::test]
async fn a_sequence_too_long_is_refused_with_the_longest_that_fits() {
    let service = Service::new("long").await;
    service.host(24 << 20).await;
    let file = service.upload("a.txt", b"text").await;
    let of = |length: u64| body(&file, json!({"training": {"sequence_length": length, "max_steps": length}}));
    let error = service.post(JOBS, &of(1 << 24)).await.error(400, "training.sequence_length");
    assert_eq!(error["code"], "sequence_too_long");
    let message = error["message"].as_str().unwrap();
    let (_, rest) = message.split_once("longest sequence that fits is ").expect(message);
    let longest: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!(longest >= 128, "{message}");
    service.post(JOBS, &of(longest)).await.json();
    service.post(JOBS, &of(longest + 1)).await.error(400, "training.sequence_length");
}

#[tokio::test]
async fn without_an_executor_a_job_is_taken_with_a_warning() {
    let service = Service::new("alone").await;
    let job = service.job(json!({})).await;
    let events = service.get(&format!("{JOBS}/{}/events", job["id"].as_str().unwrap())).await.json();
    let warning = &events["data"][0];
    assert_eq!(warning["level"], "warn");
    assert!(warning["message"].as_str().unwrap().contains("No executor"), "{warning}");

    service.host(GIB).await;
    let beyond = service.job(json!({"training": {"sequence_length": 1024}})).await;
    let events = service.get(&format!("{JOBS}/{}/events", beyond["id"].as_str().unwrap())).await.json();
    assert!(events["data"][0]["message"].as_str().unwrap().contains("512"), "{events}");
}

#[tokio::test]
async fn one_key_makes_one_job() {
    let service = Service::new("key").await;
    let file = service.upload("a.txt", b"text").await;
    let asked = body(&file, json!({"suffix": "a"}));
    let post = async |asked: &Value, key: &str| service.post_with(JOBS, asked, &[("idempotency-key", key)]).await;
    let first = post(&asked, "one").await.json();
    assert_eq!(post(&asked, "one").await.json(), first, "the same key and body is the same job");
    assert_ne!(post(&asked, "two").await.json()["id"], first["id"]);
    assert_ne!(service.post(JOBS, &asked).await.json()["id"], first["id"]);
    let other = post(&body(&file, json!({"suffix": "b"})), "one").await;
    assert_eq!(other.error(409, "Idempotency-Key")["code"], "idempotency_key_reused");
    assert_eq!(other.header("x-should-retry"), Some("false"));
    post(&asked, &"k".repeat(256)).await.error(400, "Idempotency-Key");
    post(&asked, "").await.error(400, "Idempotency-Key");
    assert_eq!(service.count("jobs").await, 3);

    let at_once = futures_util::future::join_all((0..6).map(|_| post(&asked, "many"))).await;
    let mut ids: Vec<Value> = at_once.iter().map(|answer| answer.json()["id"].clone()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1, "six at once make one job");
}

#[tokio::test]
async fn what_a_client_sends_again_makes_one_job() {
    let service = Service::new("replay").await;
    let file = service.upload("a.txt", b"text").await;
    let asked = body(&file, json!({}));
    let post = async |retry: &str| service.post_with(JOBS, &asked, &[("x-stainless-retry-count", retry)]).await.json();
    let first = post("0").await;
    assert_eq!(post("1").await["id"], first["id"]);
    assert_eq!(post("2").await["id"], first["id"]);
    let second = post("0").await;
    assert_ne!(second["id"], first["id"], "a new request is a new job");
    assert_eq!(post("1").await["id"], second["id"], "the newest is the one that is repeated");
    let other = body(&file, json!({"suffix": "other"}));
    let fresh = service.post_with(JOBS, &other, &[("x-stainless-retry-count", "1")]).await.json();
    assert_ne!(fresh["id"], second["id"], "another body is another job");

    let window = Duration::from_mins(16).as_secs();
    let age = format!("UPDATE jobs SET created_at = created_at - make_interval(secs => {window})");
    sqlx::Executor::execute(&mut service.database.connection().await, sqlx::AssertSqlSafe(age)).await.unwrap();
    let late = post("1").await["id"].clone();
    assert!(late != first["id"] && late != second["id"], "an old job is no answer to a retry");
}
