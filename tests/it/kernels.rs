//! What can be known of the GPU kernels without a GPU: the fatbins hold every kernel by name, the table knows every source,
//! and a machine that lacks something is told what in one line.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use longhaul::engine::backend::cuda::kernels::{KERNELS, embedded};

/// True when `name` stands in `bytes` as a whole word.
fn holds(bytes: &[u8], name: &str) -> bool {
    let word = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let found = |at: usize| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        bytes[at..].starts_with(name.as_bytes()) && !word(before) && !word(bytes.get(at + name.len()))
    };
    (0..bytes.len()).any(found)
}

#[test]
fn a_name_is_found_only_as_a_whole_word() {
    assert!(holds(b".text.rmsnorm_8\0", "rmsnorm_8"));
    assert!(!holds(b"\0rmsnorm_81\0", "rmsnorm_8"));
    assert!(!holds(b"\0my_rmsnorm_8\0", "rmsnorm_8"));
}

#[test]
fn every_kernel_is_in_the_fatbin_of_its_file() {
    // A build without nvcc has none, and says so when asked for a GPU.
    let Ok(fatbins) = embedded() else { return };
    for (file, names) in KERNELS {
        let (_, bytes) = fatbins.iter().find(|(name, _)| name == file).unwrap_or_else(|| panic!("no fatbin of {file}"));
        for name in *names {
            assert!(holds(bytes, name), "{name} is not in the fatbin of {file}.cu");
        }
    }
}

#[test]
fn every_kernel_in_the_sources_is_in_the_table() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut written = BTreeSet::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.extension().is_none_or(|end| end != "cu") {
            continue;
        }
        let file = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        for kernel in text.split("__global__").skip(1) {
            // `void __launch_bounds__(THREADS) name(`: the name follows the bounds' closing bracket.
            let name = kernel.split_once(')').unwrap().1.split('(').next().unwrap().trim().to_owned();
            written.insert((file.clone(), name));
        }
    }
    let table: BTreeSet<(String, String)> = KERNELS
        .iter()
        .flat_map(|(file, names)| names.iter().map(|name| ((*file).to_owned(), (*name).to_owned())))
        .collect();
    assert_eq!(table, written);
}

/// The assembly text of a fatbin: the embedded PTX, which is not compressed.
fn assembly(fatbin: &[u8]) -> String {
    let text = String::from_utf8_lossy(fatbin);
    let start = text.find(".version").expect("a fatbin holds PTX for GPUs that it has no machine code for");
    text[start..].to_owned()
}

/// Instructions on f32 in which the assembler may fuse a product with a sum, or that are fused already.
fn fusible(assembly: &str) -> Vec<&str> {
    let words = assembly.split([' ', '\t', '\n', ';']);
    words.filter(|word| ["fma.rn.f32", "mul.f32", "add.f32", "sub.f32"].contains(word)).collect()
}

#[test]
fn an_update_is_rounded_operation_by_operation() {
    assert_eq!(fusible("\tfma.rn.f32 %f1;\n\tmul.f32 %f2;\n\tmul.rn.f32 %f3;"), ["fma.rn.f32", "mul.f32"]);
    let Ok(fatbins) = embedded() else { return };
    let (_, adamw) = fatbins.iter().find(|(name, _)| *name == "adamw").unwrap();
    let assembly = assembly(adamw);
    assert!(assembly.contains("div.rn.f32") && assembly.contains("sqrt.rn.f32"), "not the approximate ones");
    // Then its bits are those of any other processor that follows IEEE 754, among them the CPU backend's.
    assert_eq!(fusible(&assembly), [""; 0]);
}

/// The driver's library is absent from the path of this process, whatever the machine has, only where there is no GPU.
#[test]
fn without_a_driver_bench_ops_says_so_in_one_line() {
    if Path::new("/dev/nvidia0").exists() {
        return;
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_longhaul")).args(["bench", "ops", "--device", "cuda"]).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    let wanted = if embedded().is_ok() { "libcuda.so.1" } else { "kernels/toolchain" };
    assert!(errors.contains(wanted), "{errors}");
    assert!(output.stdout.is_empty(), "no measurement was made");
}
