//! A plan asked of a server without an executor of its own, its data read by an executor elsewhere; then by the command.

use longhaul::{
    client::{create, jobs},
    domain::ids::random_suffix,
};
use serde_json::{Value, json};

use super::prepare;
use crate::support::{
    Sandbox,
    server::{Process, Server, trainers, until},
};

#[test]
fn a_plan_tells_what_the_job_would_come_to() {
    let sandbox = Sandbox::new("plans");
    let server = Server::start(&sandbox.join("server"), &["--no-executor"]);
    let body = prepare(&server);
    let (models, weights) = (server.folder.join("models"), server.folder.join("weights"));
    let database = server.database_url();
    let folders = ["--models", models.to_str().unwrap(), "--weights", weights.to_str().unwrap()];
    let arguments = [&["execute", "--database-url", &database][..], &folders].concat();
    let executor = Process::start(&sandbox.join("executor"), &arguments);
    let plan = until("a plan", || {
        let plan = server.client.post_again("/v1/fine_tuning/plans", &body, &random_suffix()).ok()?;
        (plan["status"] != "queued").then_some(plan)
    });
    assert_eq!(plan["status"], "ready", "{plan}\n{}", executor.log());
    let data = &plan["data"];
    assert_eq!(
        (&data["documents"], &data["sequence_length"], &data["total_steps"]),
        (&json!(1), &json!(512), &json!(24))
    );
    assert_eq!(data["validation"]["tokens"], data["tokens"]);
    assert_eq!(data["preview"][0]["spans"][0]["trained"], true);
    let shown = data["preview"][0]["spans"][0]["text"].as_str().unwrap();
    assert!(shown.contains("Line 0: 0 green bottles"), "{shown}");
    assert_eq!((plan["hosts"].as_array().unwrap().len(), &plan["hosts"][0]["fits"]), (1, &json!(true)), "{plan}");
    until("the trainer to be gone", || trainers(&sandbox.join("executor")).is_empty().then_some(()));

    let mut out = Vec::new();
    let settings = vec!["training.long_documents=refuse".to_owned(), "training.sequence_length=64".to_owned()];
    let from = server.folder.join("body.json");
    std::fs::write(&from, body.to_string()).unwrap();
    let args = |settings: &[String]| create::Args {
        from: Some(from.clone()),
        settings: settings.to_vec(),
        ..create::Args::default()
    };
    let mut run = |settings: &[String]| {
        out.clear();
        let args = jobs::Args { command: jobs::Command::Plan(args(settings)) };
        jobs::run(&args, &server.client, &mut out).unwrap();
        String::from_utf8(out.clone()).unwrap()
    };
    let said = run(&[]);
    assert!(said.contains("total_steps       24") && said.contains("s a step"), "{said}");
    let said = run(&settings);
    assert!(said.contains("the job would fail: document.txt line 1"), "{said}");
    let jobs: Value = server.client.get("/v1/fine_tuning/jobs", longhaul::client::http::SHORT, |_| ()).unwrap();
    assert_eq!(jobs["data"], json!([]), "no job was made");
}
