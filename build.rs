//! Compiles `kernels/*.cu` to fatbins and writes `fatbins.rs`, the table that embeds them.
//!
//! nvcc is taken from `NVCC`, `$CUDA_HOME/bin/nvcc` or the wheels that `kernels/toolchain` installs. Without one the table is
//! empty: the binary builds, trains on the CPU, and says what it lacks when asked for a GPU.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Machine code for Hopper, and PTX of the oldest supported architecture for the driver to compile on any other.
const TARGETS: [&str; 2] = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"];
/// Uncompressed, so that a test can look for the kernels' names.
const OPTIONS: [&str; 6] = ["-O3", "-std=c++20", "-fatbin", "-no-compress", "-Xptxas", "-v"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut table = String::from("&[\n");
    if let Some(nvcc) = nvcc() {
        for source in sources() {
            let name = source.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names");
            let fatbin = out.join(name).with_extension("fatbin");
            compile(&nvcc, &source, &fatbin);
            let fatbin = fatbin.to_str().expect("OUT_DIR is plain text");
            writeln!(table, "    ({name:?}, include_bytes!({fatbin:?})),").expect("a String takes any text");
        }
    } else {
        println!(
            "cargo:warning=nvcc not found, GPU kernels are left out: run kernels/toolchain, or set NVCC or CUDA_HOME"
        );
    }
    table.push_str("]\n");
    fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR can be written");
}

/// The first compiler that exists.
fn nvcc() -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let toolkit = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let pythons = fs::read_dir(".cuda/lib").into_iter().flatten().filter_map(Result::ok);
    let wheels = pythons.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    named.into_iter().chain(toolkit).chain(wheels).find(|path| path.is_file())
}

/// `kernels/*.cu` by name.
fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("the folder kernels is part of the source");
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut sources: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    sources.sort();
    sources
}

/// Compiles one file; fails the build on errors and on registers spilled to memory.
fn compile(nvcc: &Path, source: &Path, fatbin: &Path) {
    let output = Command::new(nvcc).args(TARGETS).args(OPTIONS).arg("-o").arg(fatbin).arg(source).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} does not compile:\n{report}", source.display());
    let spills =
        report.split(',').filter_map(|part| part.trim().split_once(" bytes spill ")).any(|(bytes, _)| bytes != "0");
    assert!(!spills, "{} spills registers:\n{report}", source.display());
}
