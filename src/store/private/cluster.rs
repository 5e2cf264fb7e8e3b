//! One cluster on disk and the server process over it: make, adopt, start, watch, stop.
//!
//! Layout of its home: `cluster/` (the data), `log/` (rotated by Postgres itself), `startup.log`, and usually the socket.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::{DATABASE, Durability, Error, SOCKET_NAME, account::Account, binaries::Binaries};

/// Longest wait for a start; recovery after a crash replays up to `max_wal_size`.
const START_LIMIT: Duration = Duration::from_mins(2);
/// Longest wait for an orderly stop before the hard one, which recovery repairs.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Longest wait after the hard stop.
const HARD_STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long the processes of a server that died may take to notice it, before they are told, and then before they are ended.
const ORPHAN_LIMITS: [(Option<Signal>, Duration); 3] = [
    (None, Duration::from_secs(5)),
    (Some(Signal::QUIT), Duration::from_secs(5)),
    (Some(Signal::KILL), Duration::from_secs(5)),
];
/// Between two looks at a cluster that is starting or stopping.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How much of the end of a log goes into an error.
const LAST_WORDS: u64 = 600;

/// Settings of every cluster. Uploads write gigabytes of log: checkpoints by time rather than by volume, full pages
/// compressed. Nothing listens on the network; the socket's folder lets only the account in.
const SETTINGS: [&str; 16] = [
    "listen_addresses=",
    "port=5432",
    "unix_socket_permissions=0700",
    "max_connections=200",
    "shared_buffers=128MB",
    "wal_compression=on",
    "max_wal_size=4GB",
    "min_wal_size=256MB",
    "checkpoint_timeout=15min",
    "checkpoint_completion_target=0.9",
    "logging_collector=on",
    "log_filename=postgres-%a.log",
    "log_truncate_on_rotation=on",
    "log_rotation_age=1d",
    "log_rotation_size=0",
    "log_min_duration_statement=5s",
];
/// Commits are on disk when they are acknowledged.
const DURABLE: [&str; 3] = ["fsync=on", "synchronous_commit=on", "full_page_writes=on"];
/// For tests: survives a killed Postgres, not a killed machine.
const VOLATILE: [&str; 3] = ["fsync=off", "synchronous_commit=on", "full_page_writes=off"];

/// A cluster and, where this process started it, its server process.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) binaries: Binaries,
    pub(super) account: Account,
    pub(super) home: PathBuf,
    pub(super) socket_folder: PathBuf,
    pub(super) durability: Durability,
    /// `None` for an adopted one, which is nobody's child.
    pub(super) postmaster: Option<Child>,
}

impl Cluster {
    /// Makes the cluster where there is none, adopts it where it runs, else starts it; then makes the database.
    pub(super) fn start(&mut self) -> Result<(), Error> {
        self.reap();
        if !self.data().join("PG_VERSION").exists() {
            self.initialize()?;
        }
        if self.adopt() {
            tracing::info!("adopted the private Postgres that an earlier server left running");
        } else {
            self.launch()?;
        }
        self.wait_until_ready()?;
        self.create_database()
    }

    /// True while the server process lives. Collects it where it was our child and has ended.
    pub(super) fn is_alive(&mut self) -> bool {
        self.reap();
        self.postmaster.is_some() || running(&self.home).is_some()
    }

    /// Ends the server: first in order, then by force. Recovery at the next start repairs what force left.
    pub(super) fn stop(&mut self) {
        for (signal, limit) in
            [(Signal::INT, STOP_LIMIT), (Signal::QUIT, HARD_STOP_LIMIT), (Signal::KILL, HARD_STOP_LIMIT)]
        {
            let Some(pid) = running(&self.home) else { break };
            // It may have ended between the look and the signal.
            let _ = kill_process(pid, signal);
            let deadline = Instant::now() + limit;
            while self.is_alive() && Instant::now() < deadline {
                thread::sleep(LOOK_INTERVAL);
            }
        }
        self.reap();
        if self.socket_folder != self.home {
            // A folder of our own under /tmp; with the socket gone it is empty.
            let _ = fs::remove_dir(&self.socket_folder);
        }
    }

    fn data(&self) -> PathBuf {
        self.home.join("cluster")
    }

    fn log(&self) -> PathBuf {
        self.home.join("startup.log")
    }

    /// Makes an empty cluster aside and renames it, so that an interrupted try leaves nothing that looks whole.
    fn initialize(&self) -> Result<(), Error> {
        let aside = self.home.join("cluster.new");
        match fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &aside)(error));
            }
            _ => {}
        }
        let mut initdb = self.account.command(&self.binaries.program("initdb"), &self.home);
        initdb.arg("--pgdata").arg(&aside).args([
            "--username",
            DATABASE,
            "--encoding=UTF8",
            "--locale=C",
            "--auth-local=trust",
            "--auth-host=reject",
            "--data-checksums",
        ]);
        if self.durability == Durability::Volatile {
            initdb.arg("--no-sync");
        }
        run(initdb, "initdb")?;
        fs::rename(&aside, self.data()).map_err(Error::io("rename", &aside))?;
        fs::File::open(&self.home).and_then(|home| home.sync_all()).map_err(Error::io("sync", &self.home))
    }

    /// True when a server over this cluster runs and listens where we look. One that listens elsewhere is stopped.
    fn adopt(&mut self) -> bool {
        if running(&self.home).is_none() {
            return false;
        }
        let listens = pid_file(&self.home).get(4).is_some_and(|folder| Path::new(folder) == self.socket_folder);
        // A server that is going down already says so.
        let stopping = pid_file(&self.home).get(7).is_some_and(|state| state.trim() == "stopping");
        if !listens || stopping {
            self.stop();
            return false;
        }
        true
    }

    /// Waits for what a server that died has left behind: Postgres does not start while a process of its predecessor lives, and
    /// one in the middle of a statement notices late.
    fn outlive_orphans(&self) {
        for (signal, limit) in ORPHAN_LIMITS {
            let deadline = Instant::now() + limit;
            for pid in signal.iter().flat_map(|_| orphans(&self.home)) {
                // It may have ended between the look and the signal.
                let _ = signal.map(|signal| kill_process(pid, signal));
            }
            while Instant::now() < deadline {
                if orphans(&self.home).is_empty() {
                    return;
                }
                thread::sleep(LOOK_INTERVAL);
            }
        }
    }

    fn launch(&mut self) -> Result<(), Error> {
        self.outlive_orphans();
        if orphans(&self.home).is_empty() {
            // Nobody works here, and this process holds the folder's lock. A process id that is still in the files may be a dead
            // server's whom nobody has asked yet how it ended, or another program's by now: Postgres would take either for its like.
            let _ = fs::remove_file(self.data().join("postmaster.pid"));
            let _ = fs::remove_file(self.socket_folder.join(format!("{SOCKET_NAME}.lock")));
        }
        let log = self.log();
        let out = fs::File::create(&log).map_err(Error::io("write", &log))?;
        let err = out.try_clone().map_err(Error::io("write", &log))?;
        let mut command = self.account.command(&self.binaries.program("postgres"), &self.home);
        command.arg("-D").arg(self.data()).stdout(out).stderr(err);
        let durability = match self.durability {
            Durability::Durable => DURABLE,
            Durability::Volatile => VOLATILE,
        };
        for setting in SETTINGS.iter().chain(&durability) {
            command.args(["-c", setting]);
        }
        command.arg("-c").arg(format!("unix_socket_directories={}", quoted(&self.socket_folder)));
        command.arg("-c").arg(format!("log_directory={}", self.home.join("log").display()));
        // A group of its own: a Ctrl-C at the terminal is for the server, which stops Postgres in its turn.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.postmaster = Some(command.spawn().map_err(Error::io("start", self.binaries.program("postgres")))?);
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            let ready = pid_file(&self.home).get(7).is_some_and(|state| state.trim() == "ready");
            if ready && running(&self.home).is_some() && self.socket_folder.join(SOCKET_NAME).exists() {
                return Ok(());
            }
            if !self.is_alive() {
                return Err(Error::Failed { program: "postgres".into(), said: self.last_words() });
            }
            thread::sleep(LOOK_INTERVAL);
        }
        Err(Error::NotReady { seconds: START_LIMIT.as_secs(), log: self.log(), said: self.last_words() })
    }

    /// Makes the one database. The single-connection tools of Postgres do it, as this floor has no client of its own.
    fn create_database(&self) -> Result<(), Error> {
        let mut createdb = self.account.command(&self.binaries.program("createdb"), &self.home);
        createdb.arg("--host").arg(&self.socket_folder).args(["--username", DATABASE, "--no-password", DATABASE]);
        match run(createdb, "createdb") {
            Err(Error::Failed { said, .. }) if said.contains("already exists") => Ok(()),
            other => other,
        }
    }

    /// Collects a child that has ended, so that its id does not look alive.
    fn reap(&mut self) {
        if let Some(child) = &mut self.postmaster
            && !matches!(child.try_wait(), Ok(None))
        {
            self.postmaster = None;
        }
    }

    /// Why the server did not start: what it said before it kept a log of its own, or the end of the newest log.
    fn last_words(&self) -> String {
        let at_first = tail(&self.log());
        if at_first.contains("FATAL") {
            return at_first.trim().to_owned();
        }
        let logs = fs::read_dir(self.home.join("log")).into_iter().flatten().flatten().map(|entry| entry.path());
        let newest = logs.max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok());
        let words = newest.map(|path| tail(&path)).filter(|text| !text.trim().is_empty());
        words.unwrap_or_else(|| tail(&self.log())).trim().to_owned()
    }
}

/// The server process over the cluster of this home, if one lives. A process id can be another program's by now, so
/// its working folder must be the cluster.
pub(super) fn running(home: &Path) -> Option<Pid> {
    let pid = Pid::from_raw(pid_file(home).first()?.trim().parse().ok()?)?;
    test_kill_process(pid).ok()?;
    let works_in = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()?;
    (works_in == fs::canonicalize(home.join("cluster")).ok()?).then_some(pid)
}

/// Processes that work in the cluster of this home; asked while its server does not live.
fn orphans(home: &Path) -> Vec<Pid> {
    let Ok(cluster) = fs::canonicalize(home.join("cluster")) else { return Vec::new() };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    let works_there =
        |pid: &Pid| fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).is_ok_and(|folder| folder == cluster);
    ids.filter(works_there).collect()
}

/// Lines of `postmaster.pid`: process id, data folder, start time, port, socket folder, address, memory key, state.
fn pid_file(home: &Path) -> Vec<String> {
    let text = fs::read_to_string(home.join("cluster/postmaster.pid")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A path as one element of a list setting.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('"', "\"\""))
}

fn run(mut command: Command, program: &str) -> Result<(), Error> {
    let ended = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().map_err(Error::io("run", program))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    Err(Error::Failed { program: program.to_owned(), said })
}

fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
