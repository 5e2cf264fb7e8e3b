//! An executor and the child that it asks about GPUs: what is published, who trains where, and what becomes of both when
//! the child lies, hangs or dies. The child and the trainers are scripts, so no GPU is needed.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use longhaul::{
    cli::model::init,
    domain::{
        Machine,
        machine::{DeviceKind, Found},
    },
    executor::{self, HubSettings, Settings},
};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::support::{
    model::{gpu, machine},
    service::{Service, body},
};

const JOBS: &str = "/v1/fine_tuning/jobs";
const GIB: u64 = 1 << 30;
/// Longest wait for anything: a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_mins(2);

/// Stands for this program. Its `machine` is the script `answer`. Its `train` is the real one where the file `real` is, else
/// it accepts every inspection, keeps the order of a training in `orders`, and refuses the job once a file of its name is in
/// `end`, or breaks at once where the file `broken` is.
const PROGRAM: &str = r#"#!/bin/sh
cd "FOLDER" || exit 1
if [ "$1" = machine ]; then exec sh ./answer; fi
if [ -e real ]; then exec "BINARY" train; fi
read -r order
case "$order" in
*'"inspect_only":true'*) echo '{"report":"finished","trained_tokens":0}'; exit;;
esac
job=$(printf '%s' "$order" | sed 's/.*"job":"\([^"]*\)".*/\1/')
printf '%s' "$order" > part.$$
mv part.$$ orders/$$
echo '{"report":"meeting","address":"127.0.0.1:1"}'
if [ -e broken ]; then echo '{"report":"broken","message":"the device was lost"}'; exit; fi
while [ ! -e "end/$job" ]; do echo '{"report":"alive"}'; sleep 0.1; done
echo '{"report":"refused","error":{"param":"training_file","message":"enough","code":"enough"}}'
"#;

/// A service with one executor, whose program is the script.
struct Host {
    service: Service,
    stop: CancellationToken,
    running: Option<JoinHandle<Result<(), executor::Error>>>,
}

impl Host {
    async fn new(name: &str) -> Self {
        let service = Service::new(name).await;
        let folder = service.sandbox.path().to_owned();
        for part in ["orders", "end"] {
            fs::create_dir(folder.join(part)).unwrap();
        }
        init(&crate::training::small_model(&folder, "models/small")).unwrap();
        let program =
            PROGRAM.replace("FOLDER", folder.to_str().unwrap()).replace("BINARY", env!("CARGO_BIN_EXE_longhaul"));
        fs::write(folder.join("program"), program).unwrap();
        fs::set_permissions(folder.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
        Self { service, stop: CancellationToken::new(), running: None }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.service.sandbox.join(name)
    }

    /// What the child does from now on.
    fn answer(&self, script: &str) {
        fs::write(self.file("answer.new"), script).unwrap();
        fs::rename(self.file("answer.new"), self.file("answer")).unwrap();
    }

    /// From now on the child finds these GPUs.
    fn has(&self, gpus: &[Machine]) {
        let machines = [gpus, &[machine(GIB)]].concat();
        let found = Found { machines, without_cuda: gpus.is_empty().then(|| "there is no driver".into()) };
        self.answer(&format!("echo '{}'", serde_json::to_string(&found).unwrap()));
    }

    fn start(&mut self) {
        let settings = Settings {
            program: self.file("program"),
            work_folder: self.file("work"),
            models_folder: self.file("models"),
            hub: HubSettings {
                endpoint: "http://127.0.0.1:9".into(),
                token: None,
                cache: self.file("hub"),
                fetch: false,
            },
            lease: Duration::from_secs(30),
            grace: Duration::from_secs(1),
            memory: Some(GIB),
            device_memory: None,
            libraries: vec!["/libraries".into()],
            machine_file: self.file("machine.json"),
            look: Duration::from_secs(2),
            address: "127.0.0.1".into(),
        };
        self.stop = CancellationToken::new();
        self.running = Some(tokio::spawn(executor::run(self.service.store.clone(), settings, self.stop.clone())));
    }

    async fn stop(&mut self) {
        self.stop.cancel();
        self.running.take().expect("it was started").await.unwrap().unwrap();
        assert_eq!(self.devices().await, None, "a host that stops is withdrawn");
    }

    /// Names of the published devices, once there are any.
    async fn devices(&self) -> Option<Vec<DeviceKind>> {
        let hosts = self.service.store.live_hosts().await.unwrap();
        Some(hosts.first()?.machines.iter().map(|machine| machine.device).collect())
    }

    async fn publishes(&self, devices: &[DeviceKind]) {
        eventually("the devices", async || (self.devices().await.as_deref() == Some(devices)).then_some(())).await;
    }

    async fn post(&self, training: Value) -> crate::support::service::Answer {
        let file = self.service.upload("a.txt", crate::training::story(2, 200).as_bytes()).await;
        let changes = json!({"model": "small", "training": training});
        self.service.post(JOBS, &body(&file, changes)).await
    }

    async fn job(&self, training: Value) -> String {
        self.post(training).await.json()["id"].as_str().unwrap().to_owned()
    }

    async fn shows(&self, job: &str) -> Value {
        self.service.get(&format!("{JOBS}/{job}")).await.json()
    }

    async fn ends(&self, job: &str) -> Value {
        eventually("the job's end", async || {
            let job = self.shows(job).await;
            ["succeeded", "failed"].contains(&job["status"].as_str().unwrap()).then_some(job)
        })
        .await
    }

    /// Runs that trainers were ordered to train so far, by job.
    fn orders(&self) -> Vec<(String, Value)> {
        let entries = fs::read_dir(self.file("orders")).unwrap().flatten();
        let orders = entries.map(|entry| serde_json::from_slice(&fs::read(entry.path()).unwrap()).unwrap());
        orders.map(|order: Value| (order["run"]["job"].as_str().unwrap().to_owned(), order["run"].clone())).collect()
    }

    async fn ordered(&self, n: usize) -> Vec<(String, Value)> {
        let all = eventually("an order", async || Some(self.orders()).filter(|orders| orders.len() >= n)).await;
        assert_eq!(all.len(), n, "{all:?}");
        all
    }

    async fn sql(&self, statement: &'static str) {
        sqlx::Executor::execute(&mut self.service.database.connection().await, statement).await.unwrap();
    }
}

async fn eventually<T>(what: &str, look: impl AsyncFn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited for {what} in vain");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Long enough for an executor to look for work again.
async fn a_while() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_gpu_trains_one_job_and_the_cpu_trains_alone() {
    use DeviceKind::{Cpu, Cuda};
    let mut host = Host::new("seats").await;
    host.has(&[gpu(GIB), gpu(2 * GIB)]);
    host.start();
    host.publishes(&[Cuda, Cuda, Cpu]).await;
    let mut jobs = Vec::new();
    for mut training in
        [json!({}), json!({"device": "cuda"}), json!({"precision": "bf16"}), json!({"precision": "f32"})]
    {
        training["sequence_parallel_size"] = json!(1);
        jobs.push(host.job(training).await);
    }
    let first = host.ordered(2).await;
    let mut gpus: Vec<Value> = first.iter().map(|(_, run)| run["gpu"].clone()).collect();
    gpus.sort_by_key(Value::as_u64);
    assert_eq!(gpus, [0, 1], "each on a GPU of its own");
    for (job, run) in &first {
        let bytes = (run["gpu"].as_u64().unwrap() + 1) * GIB;
        assert!(jobs[..2].contains(job), "in their order");
        assert_eq!((&run["machine"]["device"], &run["machine"]["device_bytes"]), (&json!("cuda"), &json!(bytes)));
        assert_eq!(run["libraries"], json!(["/libraries"]));
    }
    a_while().await;
    host.ordered(2).await;

    let (done, freed) = (&first[0].0, &first[0].1["gpu"]);
    fs::write(host.file("end").join(done), "").unwrap();
    assert_eq!(host.ends(done).await["error"]["code"], "enough");
    let orders = host.ordered(3).await;
    let third = orders.iter().find(|(job, _)| *job == jobs[2]).expect("the third job is next");
    assert_eq!(third.1["gpu"], *freed);
    a_while().await;
    host.ordered(3).await;
    for job in &jobs[..3] {
        fs::write(host.file("end").join(job), "").unwrap();
    }
    let orders = host.ordered(4).await;
    let last = orders.iter().find(|(job, _)| *job == jobs[3]).expect("the fourth job comes last");
    assert_eq!(last.1["machine"]["device"], "cpu", "f32 is for the CPU");
    fs::write(host.file("end").join(&jobs[3]), "").unwrap();
    host.ends(&jobs[3]).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_several_gpus_is_a_trainer_for_each() {
    use DeviceKind::{Cpu, Cuda};
    let mut host = Host::new("group").await;
    let other = Machine { device_name: "Other".into(), ..gpu(2 * GIB) };
    host.has(&[gpu(2 * GIB), other, gpu(2 * GIB), gpu(2 * GIB)]);
    host.start();
    host.publishes(&[Cuda, Cuda, Cuda, Cuda, Cpu]).await;
    let sizes = |sequence: u32, data: u32| json!({"sequence_parallel_size": sequence, "data_parallel_size": data, "gradient_accumulation_steps": 2});
    let first = host.job(sizes(2, 1)).await;
    let of = |orders: &[(String, Value)], job: &str| -> Vec<Value> {
        let mut runs: Vec<Value> = orders.iter().filter(|(id, _)| id == job).map(|(_, run)| run.clone()).collect();
        runs.sort_by_key(|run| run["place"]["rank"].as_u64());
        runs
    };
    let runs = of(&host.ordered(2).await, &first);
    let places: Vec<_> =
        runs.iter().map(|run| (&run["place"]["rank"], &run["gpu"], &run["place"]["address"])).collect();
    let (zero, one, two, start, address) = (json!(0), json!(1), json!(2), json!("127.0.0.1:0"), json!("127.0.0.1:1"));
    assert_eq!(places, [(&zero, &zero, &start), (&one, &two, &address)], "of one kind, the second after the first");
    assert_eq!(runs[0]["place"]["token"], runs[1]["place"]["token"]);
    assert!(runs[0]["place"]["token"].as_str().is_some_and(|token| token.len() > 20));
    for run in &runs {
        assert_eq!(run["ranks"], json!({"sequence": 2, "data": 1}));
        assert_eq!((&run["machine"]["n_devices"], &run["machine"]["host_bytes"]), (&json!(2), &json!(4 * GIB)));
    }
    // Two of a kind are not free, and the third job does not pass the second.
    let (second, third) = (host.job(sizes(1, 2)).await, host.job(sizes(1, 1)).await);
    a_while().await;
    host.ordered(2).await;
    fs::write(host.file("end").join(&first), "").unwrap();
    assert_eq!(host.ends(&first).await["error"]["code"], "enough");
    let orders = host.ordered(5).await;
    let gpus: Vec<Value> = of(&orders, &second).iter().map(|run| run["gpu"].clone()).collect();
    assert_eq!(gpus, [0, 2]);
    let token = |job: &str| of(&orders, job)[0]["place"]["token"].clone();
    assert_ne!(token(&first), token(&second), "each attempt has a secret of its own");
    assert!([json!(1), json!(3)].contains(&of(&orders, &third)[0]["gpu"]));
    for job in [&second, &third] {
        fs::write(host.file("end").join(job), "").unwrap();
        host.ends(job).await;
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_fails_leaves_the_cpu_and_is_asked_again() {
    let mut host = Host::new("child").await;
    let flood = "yes | head -c 10000000";
    for script in
        ["echo garbage", "kill -9 $$", "echo '{\"machines\": []}'", "exit 3", "echo $$ > pid; exec sleep 1000", flood]
    {
        host.answer(script);
        host.start();
        host.publishes(&[DeviceKind::Cpu]).await;
        let refused = host.post(json!({"device": "cuda"})).await.error(400, "training.device");
        assert_eq!(refused["code"], "no_such_device", "{script}");
        host.post(json!({"device": "cpu"})).await.json();
        host.stop().await;
    }
    let pid = fs::read_to_string(host.file("pid")).unwrap();
    eventually("the child that hung to be gone", async || {
        (!PathBuf::from(format!("/proc/{}", pid.trim())).exists()).then_some(())
    })
    .await;

    host.answer("exit 1");
    host.start();
    host.publishes(&[DeviceKind::Cpu]).await;
    host.has(&[gpu(GIB)]);
    host.publishes(&[DeviceKind::Cuda, DeviceKind::Cpu]).await;
    host.post(json!({"device": "cuda"})).await.json();
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_went_away_is_waited_for() {
    use DeviceKind::{Cpu, Cuda};
    let mut host = Host::new("away").await;
    fs::write(host.file("broken"), "").unwrap();
    host.has(&[gpu(GIB)]);
    host.start();
    host.publishes(&[Cuda, Cpu]).await;
    host.has(&[]);
    let any = host.job(json!({})).await;
    assert_eq!(host.ordered(1).await[0].1["machine"]["device"], "cuda");
    host.publishes(&[Cpu]).await;
    host.sql("UPDATE jobs SET run_after = now()").await;
    a_while().await;
    host.ordered(1).await;
    assert_eq!(host.shows(&any).await["status"], "queued", "on the CPU it might take for ever");

    host.has(&[gpu(GIB)]);
    let cpu = host.job(json!({"device": "cpu"})).await;
    let on_cpu = eventually("the CPU to train what is the CPU's", async || {
        host.orders().into_iter().find(|(job, _)| *job == cpu)
    });
    assert_eq!(on_cpu.await.1["machine"]["device"], "cpu");
    host.publishes(&[Cuda, Cpu]).await;
    let third =
        eventually("the job that waited", async || host.orders().into_iter().filter(|(job, _)| *job == any).nth(1));
    assert_eq!(third.await.1["machine"]["device"], "cuda");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_keeps_its_folder_from_inspection_to_training() {
    let mut host = Host::new("folder").await;
    host.has(&[]);
    host.start();
    host.publishes(&[DeviceKind::Cpu]).await;
    for n in 1..=30 {
        let job = host.job(json!({})).await;
        fs::write(host.file("end").join(&job), "").unwrap();
        assert_eq!(host.ends(&job).await["error"]["code"], "enough");
        assert_eq!(host.service.count("jobs WHERE attempts = 1").await, n, "each was trained at the first attempt");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_no_trainer_can_open_fails_its_job_with_the_reason() {
    if PathBuf::from("/dev/nvidia0").exists() {
        return;
    }
    let mut host = Host::new("broken").await;
    fs::write(host.file("real"), "").unwrap();
    host.has(&[gpu(GIB)]);
    host.start();
    host.publishes(&[DeviceKind::Cuda, DeviceKind::Cpu]).await;
    let job = host.job(json!({"max_steps": 2, "long_documents": "split"})).await;
    eventually("a first attempt that failed", async || {
        let waits = "jobs WHERE status = 'queued' AND attempts = 1 AND lease_owner IS NULL";
        (host.service.count(waits).await == 1).then_some(())
    })
    .await;
    host.sql("UPDATE jobs SET attempts = 4, run_after = now()").await;
    let failed = host.ends(&job).await;
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("server_error")));
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(message.contains("libcuda.so.1") || message.contains("kernels/toolchain"), "{message}");
    let events = host.service.get(&format!("{JOBS}/{job}/events?limit=100")).await.json();
    assert!(!events.to_string().contains("planned on"), "what was not opened is not planned on: {events}");

    let job = host.job(json!({"device": "cpu", "max_steps": 2, "long_documents": "split"})).await;
    let trained = host.ends(&job).await;
    assert_eq!(trained["status"], "succeeded", "{trained}");
    assert_eq!(trained["training"]["precision"], "f32", "settled by the checkpoint");
    let events = host.service.get(&format!("{JOBS}/{job}/events?limit=100")).await.json();
    assert!(events.to_string().contains(" in f32: sequences of up to"), "{events}");
    host.stop().await;
}
