//! The committed contract is the one the code generates, and the shapes in it are those that the code reads.

use std::{collections::BTreeSet, fs, path::Path};

use longhaul::{
    api::openapi_yaml,
    domain::{hyperparameters::TRAINING_FIELDS, job_request},
};

/// Set to 1 to write the file instead of comparing with it.
const WRITE: &str = "LONGHAUL_WRITE_OPENAPI";

#[test]
fn the_committed_contract_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.yaml");
    let generated = openapi_yaml();
    if std::env::var(WRITE).is_ok_and(|value| value == "1") {
        fs::write(&path, &generated).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (a, b))) =
        committed.lines().zip(generated.lines()).enumerate().find(|(_, (committed, generated))| committed != generated)
    {
        panic!(
            "openapi.yaml line {}: committed `{a}`, generated `{b}`.\nIf the change is meant: {WRITE}=1 cargo test --test it openapi, and commit the file.",
            line + 1
        );
    }
    assert!(
        committed == generated,
        "openapi.yaml is not as long as the generated one: {WRITE}=1 cargo test --test it openapi"
    );
}

/// The body's schema is written apart from the code that reads it; they must name the same fields.
#[test]
fn the_create_schema_names_the_fields_that_are_read() {
    let document: serde_json::Value = serde_json::from_str(&longhaul::api::openapi_json()).unwrap();
    let properties = |schema: &str| -> BTreeSet<String> {
        let object = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        object.keys().cloned().collect()
    };
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    assert_eq!(properties("CreateJob"), owned(&job_request::REQUEST_FIELDS));
    let training: Vec<&str> =
        TRAINING_FIELDS.into_iter().chain(job_request::MORE_FILES).chain([job_request::PRIORITY]).collect();
    assert_eq!(properties("CreateTraining"), owned(&training));
}

/// Every answer that is not a success is promised to be the envelope.
#[test]
fn every_error_is_the_envelope() {
    let document: serde_json::Value = serde_json::from_str(&longhaul::api::openapi_json()).unwrap();
    let mut seen = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            for (status, response) in operation["responses"].as_object().unwrap() {
                if status.starts_with('4') || status.starts_with('5') {
                    let schema = &response["content"]["application/json"]["schema"]["$ref"];
                    assert_eq!(schema, "#/components/schemas/ErrorEnvelope", "{method} {path} {status}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 20, "only {seen} errors are in the contract");
}
