//! Starts trainers as child processes of this host, and speaks with them in lines.

use std::{
    collections::VecDeque,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    domain::RunSpec,
    trainer::protocol::{MAX_LINE_BYTES, Order, Report},
};

/// Orders and reports that wait for their reader; then the writer waits.
pub(super) const READ_AHEAD: usize = 16;
/// Last lines of a trainer's log that are told when it dies.
const LAST_LINES: usize = 3;
/// Longest part of a log line that is kept.
const MAX_LOG_LINE: usize = 2000;
/// How long a trainer that has said its last word may take to exit.
const LAST_WORD: Duration = Duration::from_secs(10);

/// What came of a trainer.
#[derive(Debug)]
pub(super) enum Said {
    Report(Report),
    /// A line that is no report; nothing is read after it.
    Garbage(String),
    /// Its output ended.
    End,
}

/// A trainer that runs, of the rank that its run names. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Trainer {
    child: Child,
    orders: mpsc::Sender<Order>,
    log: Arc<Mutex<VecDeque<String>>>,
    tasks: [JoinHandle<()>; 3],
}

impl Drop for Trainer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Starts `program train` in the run's work folder, gives it the run, and passes every new deadline of the lease on to it. What it
/// says is told with its rank.
pub(super) fn start(
    program: &Path,
    run: RunSpec,
    deadline: watch::Receiver<Instant>,
    tell: mpsc::Sender<(u64, Said)>,
) -> std::io::Result<Trainer> {
    let mut child = Command::new(program)
        .arg("train")
        .current_dir(&run.work_dir)
        // Trainers read customers' data: they hold no credentials.
        .env_remove("DATABASE_URL")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // An interrupt from the terminal is for the executor, which then stops its trainers in good order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        return Err(std::io::Error::other("a pipe to the trainer is missing"));
    };
    let (orders, order_queue) = mpsc::channel(READ_AHEAD);
    let (log, rank) = (Arc::default(), run.place.rank);
    let tasks = [
        tokio::spawn(command(stdin, run.clone(), deadline, order_queue)),
        tokio::spawn(hear(stdout, rank, tell)),
        tokio::spawn(overhear(stderr, run, Arc::clone(&log))),
    ];
    Ok(Trainer { child, orders, log, tasks })
}

impl Trainer {
    /// Asks it to stop at its next step boundary.
    pub(super) async fn stop(&self, checkpoint: bool) {
        // One that does not listen any more is at its end anyway.
        let _ = self.orders.send(Order::Stop { checkpoint }).await;
    }

    /// Ends it now, also where it is stopped; does not wait until it is gone.
    pub(super) fn kill(&mut self) {
        // One that was waited for has no process any more.
        if self.child.id().is_some()
            && let Err(error) = self.child.start_kill()
        {
            tracing::warn!(%error, "a trainer could not be killed");
        }
    }

    /// Waits for the exit of one that was killed or has closed its output, and says how it ended.
    pub(super) async fn end(&mut self) -> String {
        let status = match timeout(LAST_WORD, self.child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => {
                self.kill();
                "it closed its output but did not exit".to_owned()
            }
        };
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = log.iter().map(String::as_str).collect();
        if lines.is_empty() { status } else { format!("{status}; its last words: {}", lines.join(" / ")) }
    }
}

/// Writes the run, then each new deadline and each order.
async fn command(
    mut stdin: ChildStdin,
    run: RunSpec,
    mut deadline: watch::Receiver<Instant>,
    mut orders: mpsc::Receiver<Order>,
) {
    let mut order = Order::Start { run: Box::new(run) };
    deadline.mark_changed();
    loop {
        let Ok(mut line) = serde_json::to_vec(&order) else { return };
        line.push(b'\n');
        // A trainer that is gone shows on its output.
        if stdin.write_all(&line).await.is_err() {
            return;
        }
        order = tokio::select! {
            Ok(()) = deadline.changed() => {
                let remaining = deadline.borrow_and_update().saturating_duration_since(Instant::now());
                Order::Lease { remaining_ms: remaining.as_millis() as u64 }
            }
            Some(order) = orders.recv() => order,
            else => return,
        };
    }
}

/// The next line of bounded length; `None` at the end, and where the last line is cut off.
async fn line(from: &mut BufReader<impl AsyncRead + Unpin>) -> Result<Option<Vec<u8>>, String> {
    let mut line = Vec::new();
    let read = (&mut *from).take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut line).await;
    read.map_err(|error| error.to_string())?;
    if line.len() > MAX_LINE_BYTES {
        return Err("a line is too long".into());
    }
    Ok((line.pop() == Some(b'\n')).then_some(line))
}

async fn hear(stdout: ChildStdout, rank: u64, tell: mpsc::Sender<(u64, Said)>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let said = match line(&mut stdout).await {
            Ok(None) => Said::End,
            Ok(Some(line)) => serde_json::from_slice(&line).map_or_else(|e| Said::Garbage(e.to_string()), Said::Report),
            Err(error) => Said::Garbage(error),
        };
        let last = !matches!(said, Said::Report(_));
        if tell.send((rank, said)).await.is_err() || last {
            return;
        }
    }
}

/// The trainer's log becomes part of ours.
async fn overhear(stderr: impl AsyncRead + Unpin, run: RunSpec, last: Arc<Mutex<VecDeque<String>>>) {
    let mut stderr = BufReader::new(stderr);
    while let Ok(Some(line)) = line(&mut stderr).await {
        let mut line = String::from_utf8_lossy(&line).into_owned();
        line.truncate(line.floor_char_boundary(MAX_LOG_LINE));
        tracing::info!(job = %run.job, epoch = run.epoch, rank = run.place.rank, trainer = line);
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.push_back(line);
        if last.len() > LAST_LINES {
            last.pop_front();
        }
    }
}
