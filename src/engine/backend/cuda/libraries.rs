//! Finds NVIDIA's libraries before anything calls them: a call into one that is absent would panic inside the bindings.
//!
//! The driver comes with the machine. cuBLASLt, cuDNN and NCCL are looked for on the library path, then in folders named by the
//! user, then among the packages of the `python3` on the path (where PyTorch's wheels put them); cuDNN finds NVRTC by itself.
//! A library found by path is loaded and kept, so that the bindings' search by name meets it.
#![expect(unsafe_code, reason = "loading a library runs its initialisers")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use cudarc::{cublaslt, cudnn, driver};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::engine::{Error, Result};

/// One library: what it is called, its file (the name that the bindings also ask for), its folder among Python's packages,
/// and the package that brings it.
struct Wanted {
    name: &'static str,
    file: &'static str,
    folder: &'static str,
    package: &'static str,
}

const CUBLASLT: Wanted =
    Wanted { name: "cuBLASLt 13", file: "libcublasLt.so.13", folder: "nvidia/cu13/lib", package: "nvidia-cublas" };
const CUDNN: Wanted =
    Wanted { name: "cuDNN 9", file: "libcudnn.so.9", folder: "nvidia/cudnn/lib", package: "nvidia-cudnn-cu13" };
const NCCL: Wanted =
    Wanted { name: "NCCL 2", file: "libnccl.so.2", folder: "nvidia/nccl/lib", package: "nvidia-nccl-cu13" };

/// Opens the driver, cuBLASLt and cuDNN, or says which is missing and where it was looked for.
pub(super) fn open(folders: &[PathBuf]) -> Result {
    // SAFETY: asks the dynamic loader for NVIDIA's driver, whose initialisers have no preconditions.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(Error::Missing(
            "no NVIDIA driver on this machine: looked for libcuda.so and libcuda.so.1 on the library path".to_owned(),
        ));
    }
    // SAFETY: as for the driver.
    if !unsafe { cublaslt::sys::is_culib_present() } {
        find(&CUBLASLT, folders).map(drop)?;
    }
    // SAFETY: as for the driver.
    if !unsafe { cudnn::sys::is_culib_present() } {
        find(&CUDNN, folders).map(drop)?;
    }
    Ok(())
}

/// NCCL, or where it was looked for. The bindings would ask for other names than its file has, so the caller asks it for its
/// functions.
pub(in crate::engine) fn nccl(folders: &[PathBuf]) -> Result<&'static Library> {
    load(Path::new(NCCL.file)).or_else(|_| find(&NCCL, folders))
}

fn find(wanted: &Wanted, folders: &[PathBuf]) -> Result<&'static Library> {
    let mut looked = vec![format!("{} on the library path", wanted.file)];
    let packages = python_packages().map(|folder| folder.join(wanted.folder));
    for folder in folders.iter().cloned().chain(packages) {
        let path = folder.join(wanted.file);
        match keep(&path) {
            Ok(library) => return Ok(library),
            Err(error) => looked.push(format!("{} ({error})", path.display())),
        }
    }
    Err(Error::Missing(format!(
        "{} not found: looked for {}; pip install {}, or name its folder",
        wanted.name,
        looked.join(", "),
        wanted.package
    )))
}

fn keep(path: &Path) -> std::result::Result<&'static Library, String> {
    if path.is_file() { load(path) } else { Err("no such file".to_owned()) }
}

/// Loads a library for the rest of the process, its symbols visible to all. A bare name is looked for on the library path.
fn load(path: &Path) -> std::result::Result<&'static Library, String> {
    // SAFETY: the file is one of NVIDIA's by name and place; its initialisers have no preconditions.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| error.to_string())?;
    // The bindings hold pointers into it: it is never closed.
    Ok(Box::leak(Box::new(library)))
}

/// The folder of installed packages of the `python3` on the path, if there is one.
fn python_packages() -> Option<PathBuf> {
    let ask = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let output = Command::new("python3").args(["-c", ask]).output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}
