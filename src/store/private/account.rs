//! The operating-system user that Postgres runs as: this process's own, or, as root, another, since `initdb` refuses root.

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
};

use super::{Error, binaries::Binaries};

/// Users tried in turn when this process is root and no setting names one.
const USERS: [&str; 2] = ["postgres", "nobody"];

/// Who runs the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Account {
    /// This process's own user.
    Own,
    /// Another one; only root can choose that.
    Other { name: String, uid: u32, gid: u32 },
}

impl Account {
    /// This process's own user unless it is root; then `wanted`, or the first of the usual ones that exists.
    pub(super) fn choose(wanted: Option<&str>) -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Own);
        }
        let users = fs::read_to_string("/etc/passwd").map_err(Error::io("read", "/etc/passwd"))?;
        let names = wanted.map_or(USERS.to_vec(), |name| vec![name]);
        let found = names.iter().find_map(|name| Self::listed(&users, name));
        found.ok_or_else(|| Error::NoAccount { name: names.join(" or ") })
    }

    /// The user of that name in the text of `/etc/passwd`. Root itself does not count.
    fn listed(users: &str, name: &str) -> Option<Self> {
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.next()? == name;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            (found && uid != 0).then(|| Self::Other { name: name.to_owned(), uid, gid })
        })
    }

    /// A command that will run as this user, in `folder`, with nothing on its standard input.
    pub(super) fn command(&self, program: &Path, folder: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(folder).stdin(Stdio::null());
        if let Self::Other { uid, gid, .. } = self {
            command.uid(*uid).gid(*gid);
        }
        command
    }

    /// Makes `folder`, where it is missing, and this user its owner. What is in it stays as it is.
    pub(super) fn own(&self, folder: &Path) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(Error::io("make", folder))?;
        if let Self::Other { uid, gid, .. } = self {
            chown(folder, Some(*uid), Some(*gid)).map_err(Error::io("change the owner of", folder))?;
        }
        Ok(())
    }

    /// Refuses a folder that some third user made.
    pub(super) fn check_owner(&self, folder: &Path) -> Result<(), Error> {
        let meta = fs::symlink_metadata(folder).map_err(Error::io("look at", folder))?;
        let own = rustix::process::geteuid().as_raw();
        let ours = match self {
            Self::Own => meta.uid() == own,
            Self::Other { uid, .. } => meta.uid() == own || meta.uid() == *uid,
        };
        if ours && meta.is_dir() { Ok(()) } else { Err(Error::Foreign(folder.to_owned())) }
    }

    /// Tries, as this user, to run a program inside `home`; names the folder in the way where that fails.
    pub(super) fn check_reach(&self, home: &Path, binaries: &Binaries) -> Result<(), Error> {
        let mut probe = self.command(&binaries.program("postgres"), home);
        let Err(error) = probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status() else {
            return Ok(());
        };
        match self {
            Self::Other { name, uid, gid } if error.kind() == ErrorKind::PermissionDenied => {
                let home = fs::canonicalize(home).unwrap_or_else(|_| home.to_owned());
                let blocked = home.ancestors().filter(|folder| !may_enter(folder, *uid, *gid)).last();
                Err(Error::OutOfReach { account: name.clone(), blocked: blocked.unwrap_or(&home).to_owned() })
            }
            _ => Err(Error::io("run postgres in", home)(error)),
        }
    }
}

/// True when the mode bits let this user pass through the folder.
fn may_enter(folder: &Path, uid: u32, gid: u32) -> bool {
    fs::metadata(folder).is_ok_and(|meta| {
        let bit = match () {
            () if meta.uid() == uid => 0o100,
            () if meta.gid() == gid => 0o010,
            () => 0o001,
        };
        meta.mode() & bit != 0
    })
}
