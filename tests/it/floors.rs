//! The rules that keep the tree honest, checked over every file of it: who may import whom, where `unsafe`, SQL and the
//! environment may stand, how long files are, what they may be called and what they may speak of.
//!
//! Each rule is a function from one file to its complaints, and each is shown to catch a planted fault. A rule that is in
//! the way is changed here, in the open, or it holds.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::source::{Token, paths, tokens};

/// A module and what it may import besides itself; the longest name that fits a file counts. `domain` is open to all.
/// ARCHITECTURE.md shows the same table.
const FLOORS: &[(&str, &[&str])] = &[
    ("bench", &["engine", "plan", "trainer"]),
    ("api", &["store", "plan"]),
    ("client", &[]),
    ("webhooks", &["store"]),
    ("executor", &["store", "plan", "trainer::protocol"]),
    ("store", &[]),
    ("trainer", &["engine", "plan"]),
    ("engine::train", &["engine", "plan"]),
    ("engine::meter", &["engine", "plan"]),
    ("engine::model", &[ERRORS, "engine::alst", "engine::layers", "engine::comm", "engine::backend"]),
    ("engine::alst", &[ERRORS, "engine::layers", "engine::optim", "engine::comm", "engine::backend"]),
    ("engine::layers", &[ERRORS, "engine::backend"]),
    ("engine::optim", &[ERRORS, "engine::backend"]),
    ("engine::data", &[ERRORS, "engine::file_map", "engine::backend"]),
    ("engine::checkpoint", &[ERRORS, "engine::file_map", "engine::backend"]),
    ("engine::file_map", &[ERRORS]),
    ("engine::comm", &[ERRORS, "engine::backend"]),
    ("engine::backend", &[ERRORS]),
    ("engine::gpus", &[ERRORS, "engine::backend"]),
    ("engine::error", &[]),
    ("plan", &[]),
    ("domain", &[]),
];
/// Stands for the engine's error type, under the names it has.
const ERRORS: &str = "engine's errors";
const ERROR_PATHS: [&str; 3] = ["engine::error", "engine::Error", "engine::Result"];
/// Where everything comes together: may import all.
const TOP: [&str; 6] = ["", "main", "config", "telemetry", "cli", "engine"];
/// Modules whose children do not know each other.
const STRANGERS: [&str; 1] = ["engine::alst"];

/// Files that may hold `unsafe`, and why.
const UNSAFE: &[(&str, &str)] = &[
    ("src/engine/backend/cpu/gemm.rs", "matrixmultiply takes raw pointers"),
    ("src/engine/backend/cpu/simd.rs", "loops compiled for AVX2"),
    ("src/engine/backend/cuda/cudnn/descriptor.rs", "cuDNN takes attributes as untyped memory"),
    ("src/engine/backend/cuda/device.rs", "copies and fills of device memory by address"),
    ("src/engine/backend/cuda/gemm.rs", "cuBLASLt takes attributes and operands as untyped memory"),
    ("src/engine/backend/cuda/kernels.rs", "launches of our own kernels"),
    ("src/engine/backend/cuda/libraries.rs", "loads NVIDIA's libraries"),
    ("src/engine/backend/cuda/pinned.rs", "host memory is mapped, touched and handed to the driver by address"),
    ("src/engine/comm/nccl/library.rs", "calls into NCCL, which takes handles and device memory by address"),
    ("src/engine/file_map.rs", "memory maps of weight and token files"),
];
/// Files that may read the environment.
const ENVIRONMENT: [&str; 3] = ["src/config.rs", "src/main.rs", "build.rs"];
/// Crates that only some floors may name.
const FENCED_CRATES: &[(&str, &[&str])] = &[
    ("sqlx", &["src/store/"]),
    (
        "tokio",
        &["src/api/", "src/store/", "src/executor/", "src/webhooks.rs", "src/main.rs", "src/cli/", "src/config.rs"],
    ),
    ("axum", &["src/api/", "src/main.rs", "src/cli/"]),
    ("ureq", &["src/client/", "src/webhooks.rs", "src/executor/hub/"]),
    ("indicatif", &["src/client/"]),
    ("prometheus_client", &["src/api/metrics.rs"]),
    ("cudarc", &["src/engine/", "src/executor/"]),
];
/// Longest file, and the largest median over `src`.
const MOST_LINES: usize = 500;
const MOST_MEDIAN_LINES: usize = 200;
/// Names that say nothing about what is inside, and so collect everything.
const EMPTY_NAMES: [&str; 6] = ["utils", "util", "common", "helpers", "helper", "manager"];
/// Words about how the code came to be. The tree speaks of itself only.
const FOREIGN: [&str; 5] = [
    concat!("/wor", "k/"),
    concat!("/roo", "t/"),
    concat!("design", ".md"),
    concat!("notes", "/"),
    concat!("work", "tree"),
];

/// One file of the tree.
struct File {
    /// From the root of the repository, with `/`.
    path: String,
    text: String,
    tokens: Vec<Token>,
}

impl File {
    fn new(path: &str, text: &str) -> Self {
        let rust = path.ends_with(".rs");
        Self { path: path.to_owned(), text: text.to_owned(), tokens: if rust { tokens(text) } else { Vec::new() } }
    }

    /// `["engine", "alst"]` for `src/engine/alst/mod.rs`; none outside `src`.
    fn module(&self) -> Option<Vec<&str>> {
        let inner = self.path.strip_prefix("src/")?.strip_suffix(".rs")?;
        let mut module: Vec<&str> = inner.split('/').collect();
        if matches!(module.last(), Some(&"mod" | &"lib")) {
            module.pop();
        }
        Some(module)
    }

    fn paths(&self) -> Vec<Vec<String>> {
        paths(&self.tokens, &self.module().unwrap_or_default())
    }

    fn complaint(&self, what: impl std::fmt::Display) -> String {
        format!("{}: {what}", self.path)
    }
}

/// True when `path` is `floor` or inside it.
fn inside(path: &str, floor: &str) -> bool {
    path.strip_prefix(floor).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn imports(file: &File) -> Vec<String> {
    let Some(module) = file.module() else { return Vec::new() };
    let module = module.join("::");
    if TOP.contains(&module.as_str()) || inside(&module, "cli") {
        return Vec::new();
    }
    let floor = FLOORS.iter().filter(|(name, _)| inside(&module, name)).max_by_key(|(name, _)| name.len());
    let Some((floor, allowed)) = floor else {
        return vec![file.complaint(format!("module {module} stands on no floor: give it one in tests/it/floors.rs"))];
    };
    let may = |target: &str| {
        inside(target, floor)
            || inside(target, "domain")
            || allowed.iter().any(|name| match *name {
                ERRORS => ERROR_PATHS.iter().any(|path| inside(target, path)),
                name => inside(target, name),
            })
    };
    let mut complaints = Vec::new();
    for path in file.paths() {
        let (Some("crate"), false) = (path.first().map(String::as_str), path.len() < 2) else { continue };
        let target = path[1..].join("::");
        if !may(&target) {
            complaints.push(file.complaint(format!("imports {target}, which is not below {floor}")));
        }
        for parent in STRANGERS {
            if stranger(&module, &target, parent) {
                complaints.push(file.complaint(format!("imports its sibling {target}")));
            }
        }
    }
    complaints
}

/// True when `module` and `target` are different children (files, so in lower case) of `parent`.
fn stranger(module: &str, target: &str, parent: &str) -> bool {
    let child = |path: &str| -> Option<String> {
        let name = path.strip_prefix(parent)?.strip_prefix("::")?.split("::").next()?;
        name.starts_with(|c: char| c.is_lowercase()).then(|| name.to_owned())
    };
    matches!((child(module), child(target)), (Some(a), Some(b)) if a != b)
}

fn fenced_crates(file: &File) -> Vec<String> {
    if !file.path.starts_with("src/") {
        return Vec::new();
    }
    let foreign = |path: &[String]| {
        let (_, homes) = FENCED_CRATES.iter().find(|(name, _)| path.first().is_some_and(|first| first == name))?;
        (!homes.iter().any(|home| file.path.starts_with(home))).then(|| path[0].clone())
    };
    let mut names: Vec<String> = file.paths().iter().filter_map(|path| foreign(path)).collect();
    names.dedup();
    names.into_iter().map(|name| file.complaint(format!("names the crate {name}"))).collect()
}

fn unsafe_code(file: &File) -> Vec<String> {
    let fenced = UNSAFE.iter().any(|(home, _)| file.path.starts_with(home));
    let used = file.tokens.contains(&Token::Word("unsafe".into()));
    if used && !fenced { vec![file.complaint("unsafe code outside the files listed in UNSAFE")] } else { Vec::new() }
}

fn environment(file: &File) -> Vec<String> {
    const READERS: [&str; 9] =
        ["var", "vars", "var_os", "vars_os", "set_var", "remove_var", "args", "args_os", "temp_dir"];
    let product = !file.path.starts_with("tests/") && !file.path.starts_with("benches/");
    if !file.path.ends_with(".rs") || !product || ENVIRONMENT.contains(&file.path.as_str()) {
        return Vec::new();
    }
    let reads =
        |path: &Vec<String>| path.windows(2).any(|pair| pair[0] == "env" && READERS.contains(&pair[1].as_str()));
    let mut complaints: Vec<String> =
        file.paths().iter().filter(|path| reads(path)).map(|path| file.complaint(path.join("::"))).collect();
    // #[arg(env = "NAME")] reads it as well.
    if attributes(&file.tokens).any(|inner| follows(inner, &["env", "="])) {
        complaints.push(file.complaint("a flag that reads the environment"));
    }
    complaints
}

fn features(file: &File) -> Vec<String> {
    if !file.path.starts_with("src/") || !attributes(&file.tokens).any(|inner| follows(inner, &["feature", "="])) {
        return Vec::new();
    }
    vec![file.complaint("cfg(feature): every build has every part, and chooses when it runs")]
}

fn panics(file: &File) -> Vec<String> {
    if !file.path.starts_with("src/") {
        return Vec::new();
    }
    let banned: [&[&str]; 4] = [&[".", "unwrap", "("], &["todo", "!"], &["unimplemented", "!"], &["dbg", "!"]];
    let used = banned.into_iter().filter(|signs| follows(&file.tokens, signs));
    used.map(|signs| file.complaint(format!("{} in the product", signs.concat()))).collect()
}

fn length(file: &File) -> Vec<String> {
    let lines = file.text.lines().count();
    let code = [".rs", ".cu", ".cuh", ".py"].iter().any(|end| file.path.ends_with(end));
    if code && lines > MOST_LINES {
        vec![file.complaint(format!("{lines} lines, more than {MOST_LINES}"))]
    } else {
        Vec::new()
    }
}

fn names(file: &File) -> Vec<String> {
    let mut complaints = Vec::new();
    let stem = file.path.rsplit_once('.').map_or(file.path.as_str(), |(stem, _)| stem);
    if stem.split('/').any(|part| EMPTY_NAMES.contains(&part)) {
        complaints.push(file.complaint("a name that says nothing"));
    }
    for pair in file.tokens.windows(2) {
        let (Token::Word(kind), Token::Word(name)) = (&pair[0], &pair[1]) else { continue };
        let empty = match kind.as_str() {
            "mod" => EMPTY_NAMES.contains(&name.as_str()),
            "struct" | "enum" | "trait" | "type" => {
                ["Manager", "Helper", "Util", "Utils", "Impl"].iter().any(|end| name.ends_with(end))
            }
            "fn" => name.starts_with("get_"),
            _ => false,
        };
        if empty {
            complaints.push(file.complaint(format!("{kind} {name} is a name that says nothing")));
        }
    }
    complaints
}

fn head(file: &File) -> Vec<String> {
    let wanted = file.path.ends_with(".rs") && (file.path.starts_with("src/") || file.path.starts_with("tests/"));
    if wanted && !file.text.starts_with("//!") {
        vec![file.complaint("does not begin by saying what it is for")]
    } else {
        Vec::new()
    }
}

fn foreign_words(file: &File) -> Vec<String> {
    let found = FOREIGN.iter().filter(|word| file.text.contains(**word));
    found.map(|word| file.complaint(format!("speaks of \"{word}\"; the tree speaks of itself only"))).collect()
}

/// The insides of `#[...]` and `#![...]`.
fn attributes(tokens: &[Token]) -> impl Iterator<Item = &[Token]> {
    let opens = |at: usize| {
        let bang = usize::from(tokens.get(at + 1) == Some(&Token::Sign('!')));
        (tokens[at] == Token::Sign('#') && tokens.get(at + 1 + bang) == Some(&Token::Sign('[')))
            .then_some(at + 2 + bang)
    };
    (0..tokens.len()).filter_map(opens).map(|start| {
        let mut depth = 1;
        let end = tokens[start..].iter().position(|token| {
            depth += i32::from(*token == Token::Sign('[')) - i32::from(*token == Token::Sign(']'));
            depth == 0
        });
        &tokens[start..end.map_or(tokens.len(), |n| start + n)]
    })
}

/// True when these words and signs stand in a row somewhere.
fn follows(tokens: &[Token], row: &[&str]) -> bool {
    let same = |(token, text): (&Token, &&str)| match token {
        Token::Word(word) => word == text,
        Token::Sign(sign) => text.chars().eq([*sign]),
        _ => false,
    };
    tokens.windows(row.len()).any(|window| window.iter().zip(row).all(same))
}

/// Every file that is written by hand, as text.
fn tree() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for part in ["src", "tests", "kernels", "migrations", "docker", "benches", ".ci"] {
        walk(&root.join(part), &mut paths);
    }
    paths.extend(
        ["build.rs", "README.md", "ARCHITECTURE.md", "Cargo.toml", "quickstart", "check"].map(|name| root.join(name)),
    );
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).ok()?; // Small binary files stand beside the tests that read them.
        let name = path.strip_prefix(root).ok()?.to_str()?.replace('\\', "/");
        Some(File::new(&name, &text))
    };
    paths.iter().filter_map(read).collect()
}

fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let generated = path.file_name().is_some_and(|name| name == "__pycache__");
        if path.is_dir() && !generated {
            walk(&path, into);
        } else if path.is_file() {
            into.push(path);
        }
    }
}

fn holds(rule: fn(&File) -> Vec<String>) {
    let complaints: Vec<String> = tree().iter().flat_map(rule).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// The rule complains of `text` as the file `path`, and not of `innocent` in the same place.
fn catches(rule: fn(&File) -> Vec<String>, path: &str, text: &str, innocent: &str) {
    assert!(!rule(&File::new(path, text)).is_empty(), "missed: {text}");
    let complaints = rule(&File::new(path, innocent));
    assert!(complaints.is_empty(), "wrongly accused: {complaints:?}");
}

#[test]
fn imports_go_down_only() {
    holds(imports);
}

#[test]
fn imports_that_go_up_are_caught() {
    let innocent = "use crate::domain::JobId; // use crate::api::x\nconst A: &str = \"crate::api::x\";";
    catches(imports, "src/store/jobs.rs", "use crate::api::jobs;", innocent);
    catches(imports, "src/store/jobs.rs", "fn f() { crate::executor::run() }", "fn f() { crate::store::run() }");
    catches(
        imports,
        "src/plan/mod.rs",
        "use crate::{domain::{JobId, *}, engine::{self}};",
        "use super::domain::JobId;",
    );
    catches(
        imports,
        "src/executor/run.rs",
        "use crate::trainer::{protocol::Order, child};",
        "use crate::trainer::protocol;",
    );
    catches(imports, "src/engine/layers/mlp.rs", "use super::super::alst::Room;", "use super::super::backend::Tensor;");
    catches(
        imports,
        "src/engine/layers/mlp.rs",
        "mod a { use super::super::super::model::X; }",
        "mod a { use super::super::linear::X; }",
    );
    catches(
        imports,
        "src/engine/layers/mod.rs",
        "pub use crate::engine::model as m;",
        "mod mlp; use mlp::Mlp; use crate::engine::Result; pub(in crate::engine) fn f() {}",
    );
    catches(imports, "src/engine/alst/a.rs", "use super::tiled_mlp::TiledMlp;", "use super::Settings;");
    assert_eq!(imports(&File::new("src/invented.rs", "")).len(), 1, "a module on no floor");
}

#[test]
fn crates_stay_behind_their_fences() {
    holds(fenced_crates);
    catches(fenced_crates, "src/api/jobs.rs", "use sqlx::query;", "use axum::Router; // sqlx::query");
    catches(fenced_crates, "src/engine/mod.rs", "fn f() { tokio::spawn(g()) }", "fn f() { std::thread::spawn(g) }");
}

#[test]
fn unsafe_stands_only_in_fenced_files() {
    holds(unsafe_code);
    catches(unsafe_code, "src/api/jobs.rs", "fn f() { unsafe { g() } }", "// unsafe\nconst A: &str = r#\"unsafe\"#;");
}

#[test]
fn the_environment_is_read_in_one_place() {
    holds(environment);
    catches(environment, "src/api/mod.rs", "fn f() { std::env::var(\"A\") }", "fn f() { std::env::current_exe() }");
    catches(environment, "src/api/mod.rs", "use std::{env::{self, args}, fs};", "use std::{env, fs};");
    catches(environment, "src/client/mod.rs", "#[arg(long, env = \"A\")] a: String", "fn f() { let env = 1; }");
}

#[test]
fn one_build_has_every_part() {
    holds(features);
    catches(features, "src/engine/mod.rs", "#[cfg(feature = \"cuda\")] mod cuda;", "#[cfg(unix)] mod cuda;");
}

#[test]
fn nothing_panics_for_want_of_code() {
    holds(panics);
    catches(panics, "src/api/mod.rs", "fn f() { g().unwrap() }", "fn f() { g().unwrap_or(1).expect(\".unwrap()\") }");
    catches(panics, "src/api/mod.rs", "fn f() { todo!() }", "fn f() { let todo = 1; }");
}

#[test]
fn files_are_short() {
    holds(length);
    catches(length, "src/api/mod.rs", &"x\n".repeat(MOST_LINES + 1), &"x\n".repeat(MOST_LINES));
    let mut lengths: Vec<usize> =
        tree().iter().filter(|file| file.module().is_some()).map(|file| file.text.lines().count()).collect();
    lengths.sort_unstable();
    let median = lengths[lengths.len() / 2];
    assert!(median <= MOST_MEDIAN_LINES, "the median file of src has {median} lines, more than {MOST_MEDIAN_LINES}");
}

#[test]
fn names_say_something() {
    holds(names);
    catches(names, "src/api/mod.rs", "mod helpers;", "mod extract;");
    catches(names, "src/api/mod.rs", "struct FileManager;", "struct File;");
    catches(names, "src/api/mod.rs", "fn get_file() {}", "fn file() {}");
    assert_eq!(names(&File::new("src/common.rs", "")).len(), 1);
}

#[test]
fn files_say_what_they_are_for() {
    holds(head);
    catches(head, "src/api/mod.rs", "use std::fs;", "//! HTTP.");
}

#[test]
fn the_tree_speaks_of_itself_only() {
    holds(foreign_words);
    catches(foreign_words, "README.md", concat!("see /wor", "k/README"), "see src/api and the network/API");
}
