//! A private Postgres: the host's installed binaries, a cluster in the data folder, a Unix socket, nothing on the network.
//!
//! `Postgres::start` gives back a running database and a thread that watches it: a cluster that dies is started again, with
//! growing pauses. A cluster left running by a killed server is adopted. Blocking code: call it where blocking is allowed.
//! Knows nothing of tables; the one SQL here makes the empty database.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

mod account;
mod binaries;
mod cluster;
mod error;

pub use binaries::Search;
pub use error::Error;

use account::Account;
use cluster::Cluster;

/// How often the watching thread looks whether the cluster lives.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);
/// First pause before a dead cluster is started again; doubled after each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between two tries to start it.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A cluster that lived this long counts as healthy: the next death starts with the first pause.
const HEALTHY: Duration = Duration::from_mins(1);
/// Socket paths must fit `sockaddr_un`: 108 bytes with the final zero.
const LONGEST_SOCKET_PATH: usize = 107;
/// Name of the socket in its folder. The port is only a name here: nothing listens on the network.
const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// The one database.
const DATABASE: &str = "longhaul";
/// Held for as long as a server uses the data folder.
const LOCK_NAME: &str = "server.lock";

/// What to run and where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The data folder; the cluster goes to `postgres/` in it.
    pub folder: PathBuf,
    /// Where to look for the binaries.
    pub search: Search,
    /// Operating-system user to run it as when this process is root; `None` takes `postgres`, else `nobody`.
    pub account: Option<String>,
    pub durability: Durability,
}

/// What a commit promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It is on disk. The only choice for real data.
    Durable,
    /// It survives the death of Postgres, not of the machine: no fsync anywhere. For tests.
    Volatile,
}

/// A private Postgres that runs until `stop`, or until this process ends and another one adopts or replaces it.
#[derive(Debug)]
pub struct Postgres {
    home: PathBuf,
    socket_folder: PathBuf,
    stop: Sender<()>,
    watcher: JoinHandle<()>,
    /// Open file whose lock keeps other servers out; free again when this process ends, however it ends.
    _lock: fs::File,
}

impl Postgres {
    /// Starts the cluster of this data folder, making it first where there is none, or adopts it where it runs.
    pub fn start(settings: &Settings) -> Result<Self, Error> {
        let lock = lock(&settings.folder)?;
        let home = settings.folder.join("postgres");
        let account = Account::choose(settings.account.as_deref())?;
        account.own(&home)?;
        let binaries = settings.search.find(&home.join("cluster"))?;
        account.check_reach(&home, &binaries)?;
        let socket_folder = socket_folder(&home, &account)?;
        let mut cluster =
            Cluster { binaries, account, home, socket_folder, durability: settings.durability, postmaster: None };
        if let Err(error) = cluster.start() {
            cluster.stop();
            return Err(error);
        }
        let (home, socket_folder) = (cluster.home.clone(), cluster.socket_folder.clone());
        let (stop, stopped) = mpsc::channel();
        let watcher = thread::Builder::new()
            .name("private-postgres".into())
            .spawn(move || watch(cluster, &stopped))
            .map_err(Error::io("start a thread for", "the private Postgres"))?;
        Ok(Self { home, socket_folder, stop, watcher, _lock: lock })
    }

    /// The address of the database, for `Settings::database_url` of the store.
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// The address of another database of this cluster.
    pub fn url_of(&self, database: &str) -> String {
        url(&self.socket_folder, database)
    }

    /// The address of the database that another process has started over this data folder.
    pub fn url_in(folder: &Path) -> String {
        url(&socket_place(&folder.join("postgres")), DATABASE)
    }

    /// Process id of the server, while it runs. For tests that kill it.
    pub fn pid(&self) -> Option<i32> {
        cluster::running(&self.home).map(|pid| pid.as_raw_nonzero().get())
    }

    /// Stops the cluster: running queries are cut off, what was committed stays. Bounded in time.
    pub fn stop(self) {
        let _ = self.stop.send(());
        if self.watcher.join().is_err() {
            tracing::error!("the thread that watches the private Postgres had panicked");
        }
    }
}

fn url(socket_folder: &Path, database: &str) -> String {
    let folder: String = socket_folder.to_string_lossy().bytes().map(escape).collect();
    format!("postgres://{DATABASE}@localhost/{database}?host={folder}")
}

/// One byte of a path for a query string.
fn escape(byte: u8) -> String {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    }
}

/// Keeps this data folder for this process.
fn lock(folder: &Path) -> Result<fs::File, Error> {
    fs::create_dir_all(folder).map_err(Error::io("make", folder))?;
    let path = folder.join(LOCK_NAME);
    let file =
        fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::InUse { folder: folder.to_owned() }),
        Err(fs::TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
    }
}

/// The cluster's home, or a short folder of its own under `/tmp` where the home's path is too long for a socket.
fn socket_place(home: &Path) -> PathBuf {
    if home.as_os_str().len() + 1 + SOCKET_NAME.len() <= LONGEST_SOCKET_PATH {
        return home.to_owned();
    }
    let digest = Sha256::digest(home.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Path::new("/tmp").join(format!("longhaul-{name}"))
}

/// Makes the socket's place where it is not the cluster's home.
fn socket_folder(home: &Path, account: &Account) -> Result<PathBuf, Error> {
    let folder = socket_place(home);
    if folder == home {
        return Ok(folder);
    }
    match fs::create_dir(&folder) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => account.check_owner(&folder)?,
        Err(error) => return Err(Error::io("make", &folder)(error)),
    }
    account.own(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).map_err(Error::io("close", &folder))?;
    Ok(folder)
}

/// Looks after the cluster until told to stop, then stops it.
fn watch(mut cluster: Cluster, stopped: &mpsc::Receiver<()>) {
    let mut pause = FIRST_PAUSE;
    let mut started = Instant::now();
    loop {
        match stopped.recv_timeout(WATCH_INTERVAL) {
            // The handle was dropped without a stop: the process is on its way out, and the next one adopts the cluster.
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(()) => return cluster.stop(),
            Err(RecvTimeoutError::Timeout) if cluster.is_alive() => continue,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if started.elapsed() >= HEALTHY {
            pause = FIRST_PAUSE;
        }
        tracing::error!(pause = ?pause, "the private Postgres has died and is started again");
        match stopped.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        started = Instant::now();
        match cluster.start() {
            Ok(()) => tracing::info!("the private Postgres runs again"),
            Err(error) => tracing::error!(%error, "the private Postgres could not be started again"),
        }
    }
}
