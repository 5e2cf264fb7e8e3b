//! `longhaul machine`, `calibrate` and `plan` on a host without a GPU: what they say, and what is wrong with what they are
//! told.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use longhaul::domain::machine::{DeviceKind, Found, MachineFile};
use serde_json::{Value, json};

use crate::support::{
    Sandbox,
    server::{Server, until},
};

/// Runs the program over a data folder.
fn longhaul(data: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.args(arguments).arg("--data").arg(data).current_dir(data).env_remove("DATABASE_URL");
    command.output().unwrap()
}

/// The one line that it ends with.
fn complaint(data: &Path, arguments: &[&str], status: i32) -> String {
    let output = longhaul(data, arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {errors}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let last = errors.lines().rfind(|line| line.starts_with("longhaul: ") || line.starts_with("error: "));
    last.unwrap_or_else(|| panic!("{arguments:?}: {errors}")).to_owned()
}

fn said<T: serde::de::DeserializeOwned>(data: &Path, arguments: &[&str]) -> T {
    let output = longhaul(data, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Tests about the absence of a GPU say nothing where there is one.
fn has_gpu() -> bool {
    Path::new("/dev/nvidia0").exists()
}

#[test]
fn a_host_without_a_gpu_says_why_and_trains_on_its_cpu() {
    if has_gpu() {
        return;
    }
    let sandbox = Sandbox::new("machine");
    let found: Found = said(sandbox.path(), &["machine", "--memory", "3000000000"]);
    let [cpu] = &found.machines[..] else { panic!("{found:?}") };
    assert_eq!((cpu.device, cpu.device_bytes, cpu.rates.source.as_str()), (DeviceKind::Cpu, 3_000_000_000, "assumed"));
    let why = found.without_cuda.unwrap();
    assert!(why.contains("libcuda.so.1") || why.contains("kernels/toolchain"), "{why}");

    let plan = ["plan", "--shape", "tiny", "--sequence-length", "256", "--json"];
    let planned: Value = said(sandbox.path(), &plan);
    assert_eq!((&planned["machine"]["device"], &planned["plan"]["precision"]), (&json!("cpu"), &json!("f32")));
    let refused = complaint(sandbox.path(), &[&plan[..], &["--device", "cuda"]].concat(), 1);
    assert!(refused.contains(&why), "{refused}");
    let refused = complaint(sandbox.path(), &["calibrate", "--device", "cuda"], 1);
    assert!(refused.contains(&why), "{refused}");
}

#[test]
fn a_plan_is_made_for_a_gpu_that_is_only_named() {
    let sandbox = Sandbox::new("named");
    let plan = |more: &[&'static str]| [&["plan", "--shape", "llama-3.2-1b", "--json"], more].concat();
    let planned: Value = said(sandbox.path(), &plan(&["--gpu", "NVIDIA H200"]));
    assert_eq!((&planned["machine"]["device"], &planned["plan"]["precision"]), (&json!("cuda"), &json!("bf16")));
    assert_eq!(planned["machine"]["rates"]["source"], "data sheet");
    let whole = planned["longest_tokens"].as_u64().unwrap();
    let planned: Value = said(sandbox.path(), &plan(&["--gpu", "H200", "--device-memory", "40000000000"]));
    let part = planned["longest_tokens"].as_u64().unwrap();
    assert!(0 < part && part < whole, "{part} and {whole}");
    let planned: Value = said(sandbox.path(), &plan(&["--gpu", "Other", "--device-memory", "40000000000"]));
    assert_eq!(planned["machine"]["device_bytes"], 40_000_000_000u64);
    for (more, words) in [
        (&["--gpu", "Other"][..], &["--device-memory", "H200"][..]),
        (&["--gpu", "H200", "--device", "cpu"], &["--gpu", "--device cpu"]),
        (&["--gpu", "H200", "--precision", "f32"], &["--precision"]),
    ] {
        let refused = complaint(sandbox.path(), &plan(more), 1);
        assert!(words.iter().all(|word| refused.contains(word)), "{more:?}: {refused}");
    }
}

#[test]
fn a_plan_for_several_gpus_tells_ranks_and_traffic() {
    let sandbox = Sandbox::new("several");
    let gpus = ["plan", "--shape", "llama-3.2-1b", "--gpu", "H200", "--gpus", "4", "--sequence-length", "65536"];
    let plan = |more: &[&'static str]| [&gpus[..], more].concat();
    let planned: Value = said(sandbox.path(), &plan(&["--json"]));
    assert_eq!(planned["plan"]["choice"]["ranks"], json!({ "sequence": 4, "data": 1 }));
    let sent = |planned: &Value, what: &str| planned["plan"]["traffic"][what].as_u64().unwrap();
    assert!(["weights", "gradients", "heads"].iter().all(|what| sent(&planned, what) > 0), "{planned}");
    assert!(planned["plan"]["traffic_seconds"]["heads"].as_f64().unwrap() > 0.0);

    // Slower links and hosts of their own: the same bytes take longer.
    let alike = ["--hosts", "2", "--network-bandwidth", "50e9", "--gradient-accumulation-steps", "2"];
    let two: Value = said(sandbox.path(), &plan(&[&alike[..], &["--sequence-ranks", "4", "--json"]].concat()));
    assert_eq!(two["plan"]["choice"]["ranks"], json!({ "sequence": 4, "data": 2 }));
    let slow: Value = said(sandbox.path(), &plan(&["--peer-bandwidth", "1e9", "--sequence-ranks", "4", "--json"]));
    let seconds = |planned: &Value| planned["plan"]["traffic_seconds"]["heads"].as_f64().unwrap();
    assert_eq!(sent(&slow, "gradients"), sent(&planned, "gradients"));
    assert!(seconds(&slow) > 10.0 * seconds(&planned));

    let output = longhaul(sandbox.path(), &plan(&alike));
    let text = String::from_utf8(output.stdout).unwrap();
    for words in ["devices    8 of 2 x 4", "a rank holds", "a rank sends", "weights ", "gradients ", "heads "] {
        assert!(text.contains(words), "{words}: {text}");
    }
    for (more, words) in [
        (&["--sequence-ranks", "3"][..], &["--sequence-ranks", "32 query heads", "1, 2, 4"][..]),
        (&["--device", "cpu"], &["--gpu", "--gpus"]),
    ] {
        let refused = complaint(sandbox.path(), &plan(more), 1);
        assert!(words.iter().all(|word| refused.contains(word)), "{more:?}: {refused}");
    }
    for (more, words) in [
        (&["--hosts", "2"][..], &["required"][..]),
        (&["--peer-bandwidth", "0"], &["--peer-bandwidth", "bytes a second"]),
        (&["--gpus", "0"], &["--gpus"]),
    ] {
        let rest = [&gpus[..5], more].concat();
        let refused = complaint(sandbox.path(), &rest, 2);
        assert!(words.iter().all(|word| refused.contains(word)), "{more:?}: {refused}");
    }
}

#[test]
fn flags_that_say_nothing_are_refused_by_name() {
    let sandbox = Sandbox::new("flags");
    for (arguments, words) in [
        (&["machine", "--memory", "16"][..], &["--memory", "number of bytes"][..]),
        (&["machine", "--device-memory", "80GB"], &["--device-memory", "number of bytes"]),
        (&["machine", "--device-memory", "-1"], &["-1"]),
        (&["plan", "--shape", "tiny", "--precision", "fp8"], &["--precision", "f32 or bf16", "fp8"]),
        (&["bench", "step", "--precision", "f16"], &["--precision", "f32 or bf16", "f16"]),
        (&["plan", "--shape", "tiny", "--device", "tpu"], &["--device", "cpu or cuda", "tpu"]),
        (&["calibrate", "--device", "gpu"], &["--device", "cpu or cuda", "gpu"]),
    ] {
        let refused = complaint(sandbox.path(), arguments, 2);
        assert!(words.iter().all(|word| refused.contains(word)), "{arguments:?}: {refused}");
    }
    let refused = complaint(sandbox.path(), &["bench", "step", "--device", "cuda", "--precision", "f32"], 1);
    assert!(refused.contains("--precision"), "{refused}");
}

#[test]
fn a_calibration_is_used_where_its_device_is() {
    let sandbox = Sandbox::new("calibrate");
    let path = sandbox.join("machine.json");
    fs::write(&path, "{").unwrap();
    let printed: Value = said(sandbox.path(), &["calibrate", "--device", "cpu"]);
    assert_eq!(printed["machine_file"], path.to_str().unwrap());
    let mut file = MachineFile::parse(&fs::read_to_string(&path).unwrap()).unwrap();
    let [measured] = &file.calibrations[..] else { panic!("{file:?}") };
    assert_eq!((measured.device, measured.rates.source.as_str()), (DeviceKind::Cpu, "calibrated"));
    assert!(fs::read_dir(sandbox.path()).unwrap().count() == 1, "nothing else is left behind");
    let cpu = |found: Found| found.machines.into_iter().find(|machine| machine.device == DeviceKind::Cpu).unwrap();
    let rates = measured.rates.clone();
    assert_eq!(cpu(said(sandbox.path(), &["machine"])).rates, rates);
    let planned: Value = said(sandbox.path(), &["plan", "--shape", "tiny", "--device", "cpu", "--json"]);
    assert_eq!(planned["machine"]["rates"], json!(rates));

    // Another device's speeds are not this one's; a second measurement stands beside them.
    file.calibrations[0].device_name = "another".into();
    let other = sandbox.join("elsewhere/other.json");
    fs::create_dir(sandbox.join("elsewhere")).unwrap();
    fs::write(&other, serde_json::to_string(&file).unwrap()).unwrap();
    let named = ["--machine-file", other.to_str().unwrap()];
    assert_eq!(cpu(said(sandbox.path(), &[&["machine"][..], &named].concat())).rates.source, "assumed");
    let _: Value = said(sandbox.path(), &[&["calibrate", "--device", "cpu"][..], &named].concat());
    let file = MachineFile::parse(&fs::read_to_string(&other).unwrap()).unwrap();
    assert_eq!(file.calibrations.len(), 2);
}

#[test]
fn a_machine_file_that_cannot_be_read_is_named_with_the_way_out() {
    let sandbox = Sandbox::new("file");
    let path = sandbox.join("machine.json");
    let rates = json!({"gemm_flops": 1e12, "attention_flops": 1e12, "memory_bytes": 1e10, "link_bytes": 1e10,
        "disk_bytes": 1e9, "source": "calibrated"});
    let with = |rates: Value| json!({"calibrations": [{"device": "cpu", "device_name": "x", "rates": rates}]});
    let mut zero = rates.clone();
    zero["link_bytes"] = json!(0.0);
    let mut missing = rates;
    missing.as_object_mut().unwrap().remove("disk_bytes");
    let texts = [
        (String::new(), "EOF"),
        ("[]".into(), "invalid"),
        (with(zero).to_string(), "link_bytes"),
        (with(missing).to_string(), "disk_bytes"),
    ];
    let commands = [&["machine"][..], &["plan", "--shape", "tiny"], &["bench", "step", "--tokens", "128"]];
    for (text, word) in &texts {
        fs::write(&path, text).unwrap();
        for command in commands {
            let refused = complaint(sandbox.path(), command, 1);
            for word in [path.to_str().unwrap(), "longhaul calibrate", "remove it", *word] {
                assert!(refused.contains(word), "{word} is missing: {refused}");
            }
        }
    }
}

#[test]
fn a_server_tells_once_why_it_uses_no_gpu_and_does_not_start_over_a_bad_machine_file() {
    if has_gpu() {
        return;
    }
    let sandbox = Sandbox::new("why");
    let server = Server::start(&sandbox.join("server"), &[]);
    let log = until("the look for GPUs", || Some(server.process.log()).filter(|log| log.contains("no GPU is used")));
    let line = log.lines().find(|line| line.contains("no GPU is used")).unwrap();
    assert!(line.contains("libcuda.so.1") || line.contains("kernels/toolchain"), "{line}");
    assert_eq!(log.matches("no GPU is used").count(), 1, "{log}");
    drop(server);

    fs::write(sandbox.join("server/machine.json"), "speed").unwrap();
    let refused = complaint(&sandbox.join("server"), &["serve", "--listen", "127.0.0.1:0"], 1);
    assert!(refused.contains("machine.json") && refused.contains("longhaul calibrate"), "{refused}");
}
