//! A temporary folder whose end is certain: a small watcher process removes it, and ends whatever runs out of it, when the
//! test drops it, fails, or is killed.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Waits for the end of its standard input, which the test process holds. Then ends every process that was started with the
/// folder in its command line or works in it (Postgres, trainers), and removes the folder. A stopped process gets the
/// signal too.
const WATCHER: &str = r#"
trap '' HUP INT TERM
cat > /dev/null
ours() {
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ "$pid" = "$$" ] && continue
        if tr '\0' ' ' 2>/dev/null < "$process/cmdline" | grep -qF -- "$FOLDER/"; then echo "$pid"
        else case "$(readlink "$process/cwd")/" in "$FOLDER"/*) echo "$pid";; esac
        fi
    done 2>/dev/null
}
tries=0
while [ $tries -lt 50 ] && found=$(ours) && [ -n "$found" ]; do
    kill -9 $found 2>/dev/null
    sleep 0.1
    tries=$((tries + 1))
done
rm -rf -- "$FOLDER"
"#;

/// A folder of one test, gone with everything in it when this is dropped.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
    watcher: Child,
}

impl Sandbox {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("longhaul-test-{}-{n}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let path = path.canonicalize().unwrap();
        // The folder goes by environment, not by argument: the watcher must not find itself.
        let watcher = Command::new("/bin/sh")
            .args(["-c", WATCHER])
            .env("FOLDER", &path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { path, watcher }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.watcher.stdin.take());
        let _ = self.watcher.wait();
    }
}
