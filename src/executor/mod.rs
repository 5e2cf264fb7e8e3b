//! Takes one job from claim to settled: lease, trainer process, checkpoints.
//!
//! An executor publishes what its host has, claims work that fits, and runs each claim as an [`attempt`]. It meets the API
//! only in Postgres and its trainers only in [`crate::trainer::protocol`].

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify, Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use self::devices::{Devices, Free, Looker};
pub use self::hub::Settings as HubSettings;
use crate::{
    domain::{ExecutorId, Invalid, JobId},
    store::{Store, hosts::NewHost, retention::GARBAGE_AGE},
};

mod allot;
mod attempt;
mod devices;
mod fetch;
mod group;
mod help;
pub mod host;
pub mod hub;
mod launcher;
mod lease;
mod models;
mod outlook;
mod prepare;
mod span;
mod tell;
mod verdict;
mod work;

/// How often a host shows that it is there.
const PUBLISH: Duration = Duration::from_secs(10);
/// Pause between two looks for leases that ran out.
const REAP: Duration = Duration::from_secs(3);
/// Pause between two sweeps of objects that no row names.
const SWEEP: Duration = Duration::from_hours(1);
/// Pause before a lost listener is opened again.
const RECONNECT: Duration = Duration::from_secs(1);
/// Attempts without a new checkpoint after which a job fails.
const MOST_ATTEMPTS: i32 = 5;

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This program; started again as `train` for each attempt, and as `machine` to look for GPUs.
    pub program: PathBuf,
    /// Folder for attempts under way. One executor at a time; emptied when it starts.
    pub work_folder: PathBuf,
    /// Folder of base models, each a Hugging Face folder `name` or `organization/name`.
    pub models_folder: PathBuf,
    /// Where base models come from that are in no folder.
    pub hub: HubSettings,
    /// How long a lease lasts unless renewed.
    pub lease: Duration,
    /// How long a trainer may take to write a checkpoint when the executor is asked to stop.
    pub grace: Duration,
    /// Bytes of memory that a trainer may use; what the host has free by default.
    pub memory: Option<u64>,
    /// Bytes of a GPU's memory that a trainer may use; what is free by default.
    pub device_memory: Option<u64>,
    /// Folders to look for NVIDIA's libraries in.
    pub libraries: Vec<PathBuf>,
    /// Measured speeds, where somebody has measured them.
    pub machine_file: PathBuf,
    /// How long a look for GPUs may take.
    pub look: Duration,
    /// Name or address under which other hosts reach this one, for jobs that take several.
    pub address: String,
}

/// Why an executor could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("{0} is used by another executor; give this one a work folder of its own")]
    InUse(PathBuf),
    #[error(transparent)]
    MachineFile(#[from] Invalid),
}

/// What every attempt works with.
#[derive(Debug)]
struct Context {
    store: Store,
    settings: Settings,
    id: ExecutorId,
    devices: watch::Sender<Devices>,
    /// Which of them nobody trains on.
    free: watch::Sender<Free>,
    /// Jobs that are worked on here, once for each attempt. Claims and the end of attempts go one after another under this
    /// lock, so that no job's folder is removed under the attempt that follows.
    held: Mutex<Vec<JobId>>,
    /// One model is fetched at a time: two would share the same line.
    fetching: Semaphore,
    /// Some job may have changed.
    hints: Notify,
    stop: CancellationToken,
}

/// Executes jobs until `stop` is cancelled; then trainers get a while to write a checkpoint, and their jobs are released.
pub async fn run(store: Store, settings: Settings, stop: CancellationToken) -> Result<(), Error> {
    let _lock = own(&settings.work_folder)?;
    fs::create_dir_all(&settings.models_folder).map_err(at(&settings.models_folder))?;
    let cpu = host::cpu(&settings.work_folder, settings.memory, &host::machine_file(&settings.machine_file)?);
    let id = ExecutorId::random();
    tracing::info!(executor = %id, device = cpu.device_name, bytes = cpu.device_bytes, "executor started");
    let devices = watch::Sender::new(Devices::without_gpus(cpu));
    let (free, held, hints) = (watch::Sender::default(), Mutex::default(), Notify::new());
    let fetching = Semaphore::new(1);
    let context = Arc::new(Context { store, settings, id, devices, free, held, fetching, hints, stop });
    // Before anything is published or claimed: a job that takes any device must not land on the CPU for want of a look.
    let mut looker = Looker::default();
    looker.look(&context).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(listen(Arc::clone(&context)));
    tasks.spawn(publish(Arc::clone(&context)));
    tasks.spawn(reap(Arc::clone(&context)));
    tasks.spawn(sweep(Arc::clone(&context)));
    tasks.spawn(work::inspect(Arc::clone(&context)));
    tasks.spawn(outlook::plans(Arc::clone(&context)));
    tasks.spawn(work::train(Arc::clone(&context), looker));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task of the executor panicked; the executor stops");
            context.stop.cancel();
        }
    }
    if let Err(error) = context.store.withdraw_host(&context.id).await {
        tracing::warn!(%error, "the host could not be withdrawn; its row grows old");
    }
    Ok(())
}

/// Keeps the work folder for this executor, and empties it: whatever lies there belongs to nobody any more.
fn own(folder: &Path) -> Result<fs::File, Error> {
    fs::create_dir_all(folder).map_err(at(folder))?;
    let path = folder.join("executor.lock");
    let file = fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(Error::InUse(folder.to_owned())),
        Err(fs::TryLockError::Error(error)) => return Err(at(&path)(error)),
    }
    let jobs = folder.join("jobs");
    match fs::remove_dir_all(&jobs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at(&jobs)(error)),
        _ => Ok(file),
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Folder { path, source }
}

impl Context {
    /// Waits so long, or less when the executor stops. True when it does.
    async fn pause(&self, pause: Duration) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => true,
            () = tokio::time::sleep(pause) => false,
        }
    }
}

impl Context {
    /// Publishes what this host has now.
    async fn show(&self) {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let models = models::found(&self.settings);
        let devices = self.devices.borrow().clone();
        let (machines, free) = (devices.machines(), devices.places(&self.free.borrow()));
        let (executor, hostname, fetches) = (&self.id, hostname.as_str(), self.settings.hub.fetch);
        let host = NewHost { executor, hostname, machines: &machines, free: &free, models: &models, fetches };
        if let Err(error) = self.store.publish_host(&host).await {
            tracing::warn!(%error, "the host could not be published; it is tried again");
        }
    }
}

/// Turns notifications of the database into hints.
async fn listen(context: Arc<Context>) {
    while !context.stop.is_cancelled() {
        if let Ok(mut hints) = context.store.job_hints().await {
            while let Some(Ok(())) = context.stop.run_until_cancelled(hints.next()).await {
                context.hints.notify_waiters();
            }
        }
        context.pause(RECONNECT).await;
    }
}

async fn publish(context: Arc<Context>) {
    let (mut changed, mut freed) = (context.devices.subscribe(), context.free.subscribe());
    loop {
        changed.borrow_and_update();
        freed.borrow_and_update();
        context.show().await;
        tokio::select! {
            stopped = context.pause(PUBLISH) => if stopped { return },
            // The sender lives as long as the context.
            Ok(()) = changed.changed() => {}
            Ok(()) = freed.changed() => {}
        }
    }
}

async fn reap(context: Arc<Context>) {
    loop {
        match context.store.reap_leases(MOST_ATTEMPTS).await {
            Ok(0) => {}
            Ok(reaped) => tracing::warn!(reaped, "leases ran out; their jobs go on from their last checkpoints"),
            Err(error) => tracing::warn!(%error, "leases could not be looked through; it is tried again"),
        }
        if context.pause(REAP).await {
            return;
        }
    }
}

async fn sweep(context: Arc<Context>) {
    while !context.pause(SWEEP).await {
        match context.store.sweep_weights(GARBAGE_AGE).await {
            Ok(0) => {}
            Ok(gone) => tracing::info!(gone, "objects that no checkpoint names deleted"),
            Err(error) => tracing::warn!(%error, "the sweep of weights failed; it is tried again"),
        }
    }
}
