//! What is trained of a line: prompts and completions, conversations under chat templates of several styles, beside
//! transformers where a Python with it is there; and how the masks come through packing into the loss.

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use longhaul::{
    domain::training::{LongDocuments, Moments, Precision},
    domain::{Invalid, ModelConfig, RunSpec, TrainingSpec, run::DataFile},
    engine::backend::cpu::Cpu,
    engine::{
        self,
        checkpoint::huggingface,
        data::{Corpus, Dataset, Token, Tokenizer, examples::Example, pack::Settings, preview::preview},
        train::{Observer, saved, session::Session},
    },
    plan::{self, Forced},
};
use serde_json::{Value, json};

use crate::{
    support::{
        self,
        model::{Tokens, machine},
        reference_python,
    },
    training::{Recorder, Studio, finish, refusal, spec, story},
};

const SPECIAL: [&str; 6] =
    ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]"];
/// 14 November 2023.
const NOW: u64 = 1_700_000_000;

/// A model folder with a chat template and its tokens.
fn folder(studio: &Studio, template: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let to = studio.sandbox.join(format!("chat-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir(&to).unwrap();
    for name in ["config.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(studio.model().join(name), to.join(name)).unwrap();
    }
    let mut tokenizer: Value =
        serde_json::from_slice(&std::fs::read(studio.model().join("tokenizer.json")).unwrap()).unwrap();
    let first = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let added = SPECIAL.iter().enumerate().map(|(i, content)| {
        json!({ "id": first + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().extend(added);
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(to.join("chat_template.jinja"), template).unwrap();
    to
}

fn style(name: &str) -> String {
    std::fs::read_to_string(support::tree().join(format!("tests/reference/templates/{name}.jinja"))).unwrap()
}

fn open(folder: &std::path::Path) -> Tokenizer {
    Tokenizer::open(folder, 1 << 20, NOW).unwrap()
}

fn tokens(tokenizer: &Tokenizer, line: &Value) -> Result<Vec<Token>, engine::Error> {
    tokenizer.example(&Example::parse(&line.to_string()).unwrap())
}

/// The text of each run of tokens that are trained.
fn trained(tokenizer: &Tokenizer, line: &Value) -> Vec<String> {
    let tokens = tokens(tokenizer, line).unwrap();
    let runs = tokens.chunk_by(|a, b| a.is_trained() == b.is_trained()).filter(|run| run[0].is_trained());
    runs.map(|run| tokenizer.text(&run.iter().map(|t| t.id() as u32).collect::<Vec<_>>()).unwrap()).collect()
}

fn text(tokenizer: &Tokenizer, line: &Value) -> String {
    let ids: Vec<u32> = tokens(tokenizer, line).unwrap().iter().map(|t| t.id() as u32).collect();
    tokenizer.text(&ids).unwrap()
}

fn refused(tokenizer: &Tokenizer, line: &Value) -> Invalid {
    match tokens(tokenizer, line).unwrap_err() {
        engine::Error::Input(invalid) => invalid,
        other => panic!("not the customer's fault: {other}"),
    }
}

fn says(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Two questions and two answers, of words beyond ASCII too.
fn conversation() -> Vec<Value> {
    vec![
        says("system", "Be brief; <b>\"quote\"</b> & 'all'."),
        says("user", "Where does the river go?  "),
        says("assistant", "Under the bridge, slowly — zum Fluß."),
        says("user", "And\n\nthen?"),
        says("assistant", "To the evening 🌙 light."),
    ]
}

fn weather() -> Value {
    let call = json!({ "id": "c1", "type": "function", "function": { "name": "weather", "arguments":
        "{\"city\": \"Köln\", \"days\": [1, 2], \"unit\": null}" } });
    let tool = json!({ "type": "function", "function": { "name": "weather", "description": "What it's like & <more>",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": [] } } });
    json!({
        "tools": [tool],
        "messages": [
            says("user", "Rain?"), { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "c1", "content": "dry" }, says("assistant", "No rain."),
        ],
    })
}

fn thoughts() -> Value {
    json!({ "messages": [
        says("user", "one"), says("assistant", "<think>\nhm\n</think>\n\nfirst"),
        says("user", "two"), says("assistant", "<think>\nwell\n</think>\n\nsecond"),
    ] })
}

#[test]
fn turns_are_marked_in_every_style() {
    let studio = Studio::new("styles");
    let line = json!({ "messages": conversation() });
    let headers = open(&folder(&studio, &style("headers")));
    let answers = ["Under the bridge, slowly — zum Fluß.", "To the evening 🌙 light."];
    assert_eq!(trained(&headers, &line), answers.map(|answer| format!("{answer}<|eot_id|>")));
    let marked = open(&folder(&studio, &style("marked")));
    assert_eq!(trained(&marked, &line), answers.map(|answer| format!("{answer}<|im_end|>")));
    let instructions = open(&folder(&studio, &style("instructions")));
    let eos = text(&instructions, &line).rsplit_once("light.").unwrap().1.to_owned();
    assert!(!eos.is_empty());
    assert_eq!(trained(&instructions, &line), answers.map(|answer| format!(" {answer}{eos}")));

    let call =
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Köln\", \"days\": [1, 2], \"unit\": null}}<|eot_id|>";
    assert_eq!(trained(&headers, &weather()), [call, "No rain.<|eot_id|>"]);
    assert_eq!(trained(&marked, &thoughts()), ["first<|im_end|>", "<think>\nwell\n</think>\n\nsecond<|im_end|>"]);
}

#[test]
fn turns_of_weight_0_are_not_trained() {
    let studio = Studio::new("weights");
    let mut messages = conversation();
    messages[2]["weight"] = json!(0);
    messages[4]["weight"] = json!(1);
    let line = json!({ "messages": messages });
    for (name, end) in [("headers", "<|eot_id|>"), ("marked", "<|im_end|>")] {
        let tokenizer = open(&folder(&studio, &style(name)));
        assert_eq!(trained(&tokenizer, &line), [format!("To the evening 🌙 light.{end}")], "{name}");
        assert!(text(&tokenizer, &line).contains("Under the bridge"), "what is not trained is still read");
    }
    // Marks around all of it at once cannot be told apart.
    let whole = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}";
    let invalid = refused(&open(&folder(&studio, whole)), &line);
    assert!(invalid.message.contains("marks 1") && invalid.message.contains("leave weight out"), "{}", invalid.message);
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out() {
    let studio = Studio::new("rewrites");
    let unmarked = style("marked").replace("{%- generation %}", "").replace("{%- endgeneration %}", "");
    let tokenizer = open(&folder(&studio, &unmarked));
    let invalid = refused(&tokenizer, &thoughts());
    for word in ["messages[1]", "{% generation %}", "weight 0", "prompt and completion"] {
        assert!(invalid.message.contains(word), "{word}: {}", invalid.message);
    }
    let mut last_only = thoughts();
    last_only["messages"][1]["weight"] = json!(0);
    assert_eq!(trained(&tokenizer, &last_only), ["<think>\nwell\n</think>\n\nsecond<|im_end|>\n"]);
}

#[test]
fn a_begin_token_comes_once() {
    let studio = Studio::new("once");
    let folder = folder(&studio, &style("headers"));
    let tokenizer = open(&folder);
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
    let (bos, eos) = (config["bos_token"].as_str().unwrap(), config["eos_token"].as_str().unwrap());
    let count = |line: &Value| {
        let text = text(&tokenizer, line);
        (text.matches(bos).count(), text.matches(eos).count())
    };
    assert_eq!(count(&json!({ "messages": conversation() })), (1, 0), "the template writes what it wants");
    for text in ["words".to_owned(), format!("{bos}words"), format!("{bos}words{eos}")] {
        assert_eq!(count(&json!({ "text": text })), (1, 1), "{text}");
        assert_eq!(
            count(&json!({ "prompt": text.trim_end_matches(eos), "completion": format!(" more{eos}") })),
            (1, 1)
        );
    }
}

#[test]
fn only_the_completion_and_the_end_are_trained() {
    let studio = Studio::new("pairs");
    let tokenizer = open(&studio.model());
    let line = json!({ "prompt": "the river and the stone:", "completion": " under the old bridge" });
    let eos = trained(&tokenizer, &json!({ "text": "stone" })).concat().rsplit_once("stone").unwrap().1.to_owned();
    assert_eq!(trained(&tokenizer, &line), [format!(" under the old bridge{eos}")]);
    let joined = tokens(&tokenizer, &line).unwrap();
    let whole = tokens(&tokenizer, &json!({ "text": "the river and the stone: under the old bridge" })).unwrap();
    assert_eq!(joined.iter().map(|t| t.id()).collect::<Vec<_>>(), whole.iter().map(|t| t.id()).collect::<Vec<_>>());
    // Beyond the length at which texts are cut into parts.
    let long = json!({ "prompt": story(3, 90_000), "completion": format!(" {}", story(4, 30)) });
    assert_eq!(trained(&tokenizer, &long), [format!(" {}{eos}", story(4, 30))]);
}

#[test]
fn the_words_around_a_template_are_those_of_transformers() {
    let studio = Studio::new("words");
    let says_what =
        |template: &str, messages: Value| text(&open(&folder(&studio, template)), &json!({ "messages": messages }));
    let pair = json!([says("developer", "d"), says("assistant", "a")]);
    let roles = "{% for m in messages %}{{ m.role }},{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}";
    assert_eq!(says_what(roles, pair.clone()), "system,d;assistant,a;");
    assert_eq!(says_what(&format!("{roles}{{# developer #}}"), pair), "developer,d;assistant,a;");
    let dated = "{{ strftime_now('%d %b %Y, %A %H:%M') }} {% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(says_what(dated, json!([says("assistant", "a")])), "14 Nov 2023, Tuesday 22:13 a");
    let raising = style("instructions");
    let invalid = refused(&open(&folder(&studio, &raising)), &json!({ "messages": [says("assistant", "a")] }));
    assert!(invalid.message.contains("user and assistant must take turns"), "{}", invalid.message);
}

#[test]
fn ids_and_masks_are_those_of_transformers() {
    let Some(python) = reference_python() else { return };
    let studio = Studio::new("chat-reference");
    let mut unweighted = conversation();
    unweighted[2]["weight"] = json!(0);
    let plain = json!({ "messages": conversation() });
    let cases = [
        ("headers", vec![plain.clone(), weather(), json!({ "messages": unweighted })]),
        (
            "marked",
            vec![plain.clone(), thoughts(), json!({ "messages": [says("user", "a"), says("assistant", "b\n")] })],
        ),
        ("instructions", vec![plain]),
    ];
    let cases = cases.into_iter().flat_map(|(name, lines)| {
        let folder = folder(&studio, &style(name));
        let tokenizer = open(&folder);
        lines
            .into_iter()
            .map(move |line| {
                let tokens = tokens(&tokenizer, &line).unwrap();
                let ids: Vec<i32> = tokens.iter().map(|t| t.id()).collect();
                let trained: Vec<u8> = tokens.iter().map(|t| u8::from(t.is_trained())).collect();
                json!({ "folder": folder, "line": line, "ids": ids, "trained": trained })
            })
            .collect::<Vec<_>>()
    });
    let at = studio.sandbox.join("cases.json");
    std::fs::write(&at, cases.collect::<Value>().to_string()).unwrap();
    let script = support::tree().join("tests/reference/check_chat.py");
    let output = Command::new(python).arg(script).arg(&at).env("HF_HUB_OFFLINE", "1").output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    eprintln!("against transformers: {}", said.trim());
}

/// Questions that differ and an answer that is always the same.
fn questions(studio: &Studio) -> DataFile {
    let lines = (0..6).map(|i| json!({ "prompt": story(i, 20 + i), "completion": " slowly under the old bridge" }));
    studio.file("pairs.jsonl", lines.map(|line| line.to_string()).collect::<Vec<_>>().join("\n"))
}

#[test]
fn packing_keeps_the_masks() {
    let studio = Studio::new("packed-masks");
    let tokenizer = open(&studio.model());
    let file = questions(&studio);
    let corpus = Corpus::open(std::slice::from_ref(&file), &tokenizer, &studio.sandbox.join("tokens")).unwrap();
    let shown = preview(&corpus, &tokenizer).unwrap();
    let spans: Vec<bool> = shown[0].spans.iter().map(|span| span.trained).collect();
    assert_eq!((shown.len(), spans), (3, vec![false, true]), "{shown:?}");
    assert!(
        shown[0].spans[1].text.starts_with(" slowly under") && shown[0].origin == "pairs.jsonl line 1",
        "{shown:?}"
    );
    let alone = corpus.document(0).iter().filter(|t| t.is_trained()).count();
    let settings =
        Settings { sequence_length: 512, pad_to: 16, packing: true, long_documents: LongDocuments::Refuse, seed: 1 };
    let dataset = Dataset::new(corpus, settings, false).unwrap();
    assert!(dataset.sequences_per_epoch() < 6, "several to a sequence");
    let mut labels = 0;
    for i in 0..dataset.sequences_per_epoch() {
        let sequence = dataset.sequence(0, i);
        for bounds in &sequence.documents {
            let range = bounds.start as usize..bounds.end as usize;
            let (ids, of_document) = (&sequence.ids[range.clone()], &sequence.labels[range]);
            let counted: Vec<usize> = (0..ids.len()).filter(|i| of_document[*i] >= 0).collect();
            assert_eq!(counted.len(), alone, "what is trained of every document is the same");
            assert!(counted.iter().all(|i| of_document[*i] == ids[i + 1]));
            assert!(counted.windows(2).all(|pair| pair[1] == pair[0] + 1));
            labels += counted.len() as u64;
        }
    }
    assert_eq!(dataset.summary().valid_labels, labels);
}

#[test]
fn the_loss_is_that_of_the_trained_tokens() {
    let studio = Studio::new("masked-loss");
    let file = questions(&studio);
    let training = TrainingSpec { sequence_length: Some(256), packing: true, learning_rate: 1e-2, ..spec(60) };
    let run = RunSpec { validation_files: vec![file.clone()], ..studio.run("run", &[file], training) };
    let recorder = finish(&run);

    // By hand: every pair a sequence of its own, labels where the completion is.
    let config = ModelConfig::from_config_text(&huggingface::config_text(&studio.model()).unwrap()).unwrap();
    let machine = machine(1 << 30);
    let request = plan::Request {
        model: &config,
        precision: Precision::F32,
        moments: Moments::F32,
        tokens: 256,
        micro_batches: 1,
        machine: &machine,
        forced: Forced::default(),
    };
    let plan = plan::plan(&request).unwrap();
    let mut session = Session::new(Cpu::<f32>::new(2).unwrap(), &plan, &config, &std::env::temp_dir()).unwrap();
    saved::load_base(&mut session, &studio.model()).unwrap();
    let tokenizer = open(&studio.model());
    let (mut loss, mut labels) = (0.0, 0);
    for i in 0..6 {
        let prompt = tokenizer.document(&story(i, 20 + i)).unwrap().len() - 1;
        let text = format!("{} slowly under the old bridge", story(i, 20 + i));
        let ids = tokenizer.document(&text).unwrap().into_iter().map(|id| id as i32).collect();
        let mut tokens = Tokens::of(&[ids]);
        tokens.labels[..prompt - 1].fill(-100);
        let totals = session.evaluate([tokens.batch()]).unwrap();
        loss += totals.loss;
        labels += totals.valid_labels;
    }
    let first = &recorder.evaluations[0];
    assert_eq!(first.valid_labels, labels);
    let expected = loss / labels as f64;
    assert!((first.valid_loss - expected).abs() < 1e-5 * expected, "{} {expected}", first.valid_loss);
    let last = recorder.evaluations.last().unwrap();
    assert!(last.valid_loss < 0.5 * first.valid_loss, "{last:?}");

    let summary = recorder.summary.unwrap();
    assert_eq!((summary.documents, summary.valid_labels), (6, labels));
    let held_out = summary.validation.unwrap();
    assert_eq!((held_out.documents, held_out.tokens, held_out.valid_labels), (6, summary.tokens, labels));
    assert_eq!(summary.preview.len(), 3);
}

#[test]
fn pieces_without_a_trained_token_are_left_out() {
    let studio = Studio::new("untrained");
    let line = json!({ "prompt": story(5, 300), "completion": " under the bridge" });
    let file = studio.file("long.jsonl", line.to_string());
    let training = TrainingSpec { sequence_length: Some(64), long_documents: LongDocuments::Split, ..spec(2) };
    let summary = finish(&studio.run("split", std::slice::from_ref(&file), training.clone())).summary.unwrap();
    assert!(summary.untrained_pieces > 1 && summary.sequences <= 2, "{summary:?}");
    let cut = TrainingSpec { long_documents: LongDocuments::Truncate, ..training };
    let invalid = refusal(&studio.run("cut", &[file], cut));
    assert!(invalid.message.contains("no token to train on"), "{}", invalid.message);
}

#[test]
fn wrong_lines_are_named_with_their_field() {
    let studio = Studio::new("wrong-lines");
    std::fs::write(studio.model().join("chat_template.jinja"), style("instructions")).unwrap();
    let good = json!({ "messages": [says("user", "a"), says("assistant", "b")] });
    let user = says("user", "a");
    let cases = [
        (json!({ "messages": "hi" }), "messages must be a list"),
        (json!({ "messages": [] }), "messages is empty"),
        (json!({ "messages": [user, 5] }), "messages[1] must be an object"),
        (json!({ "messages": [{ "content": "a" }] }), "messages[0] has no role"),
        (json!({ "messages": [says("robot", "a")] }), "messages[0].role must be one of system, developer, user"),
        (json!({ "messages": [user, { "role": "assistant" }] }), "messages[1] has no content"),
        (json!({ "messages": [user, { "role": "assistant", "content": 5 }] }), "messages[1].content must be"),
        (
            json!({ "messages": [user, { "role": "user", "content": [{ "type": "image_url" }] }] }),
            "messages[1].content[0].type",
        ),
        (
            json!({ "messages": [user, { "role": "assistant", "content": "b", "weight": 0.5 }] }),
            "messages[1].weight must be 0 or 1",
        ),
        (json!({ "messages": [{ "role": "user", "content": "a", "weight": 1 }] }), "messages[0].weight is for"),
        (json!({ "messages": [user] }), "no message of the assistant with weight 1"),
        (
            json!({ "messages": [user, { "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "{" } }] }] }),
            "messages[1].tool_calls[0].function.arguments",
        ),
        (json!({ "messages": [user, says("assistant", "b")], "tools": {} }), "tools must be a list"),
        (json!({ "messages": [user, says("user", "b"), says("assistant", "c")] }), "take turns"),
        (json!({ "prompt": "a" }), "no completion"),
        (json!({ "completion": "a" }), "no prompt"),
        (json!({ "prompt": ["a"], "completion": "b" }), "prompt must be a string"),
        (json!({ "prompt": "a", "completion": "" }), "completion is empty"),
        (json!({ "text": "a", "messages": [] }), "text and messages"),
    ];
    for (line, words) in cases {
        let file = studio.file("bad.jsonl", format!("{good}\n{line}\n"));
        let invalid = refusal(&studio.run("run", &[file], spec(1)));
        assert_eq!(
            (invalid.code.as_str(), invalid.param.as_str()),
            ("invalid_training_file", "training_file"),
            "{line}"
        );
        assert!(invalid.message.starts_with("bad.jsonl line 2: "), "{}", invalid.message);
        assert!(invalid.message.contains(words), "{words:?} is not in: {}", invalid.message);
    }
    std::fs::remove_file(studio.model().join("chat_template.jinja")).unwrap();
    let file = studio.file("chat.jsonl", good.to_string());
    let invalid = refusal(&studio.run("none", &[file], spec(1)));
    assert_eq!(invalid.code, "no_chat_template");
    for word in ["chat.jsonl line 1", "chat_template.jinja", "prompt and completion"] {
        assert!(invalid.message.contains(word), "{}", invalid.message);
    }
    std::fs::write(studio.model().join("chat_template.jinja"), "{% for m in").unwrap();
    let file = studio.file("chat.jsonl", good.to_string());
    let invalid = refusal(&studio.run("broken", &[file], spec(1)));
    assert_eq!(
        (invalid.code.as_str(), invalid.param.as_str()),
        ("invalid_chat_template", "model"),
        "{}",
        invalid.message
    );
    finish(&studio.run("text", &[studio.five()], spec(1)));
}

#[test]
fn an_inspection_shows_what_it_read() {
    let studio = Studio::new("shown");
    let run = RunSpec { inspect_only: true, ..studio.run("run", &[studio.five()], spec(1)) };
    let mut recorder = Recorder::default();
    engine::train::train(&run, &mut recorder as &mut dyn Observer).unwrap();
    let shown = recorder.summary.unwrap().preview;
    assert_eq!(shown.len(), 3);
    let long = &shown[2].spans[0];
    assert!(long.trained && long.tokens > 64 && long.end.is_some() && long.text.len() < 1000, "{long:?}");
    assert!(serde_json::to_string(&shown).unwrap().len() < 10_000);
}
