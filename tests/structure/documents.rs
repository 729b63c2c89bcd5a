//! The files, functions, metrics, flags, targets of make and fields that documents name must exist, and the documents
//! must name what users see. The comparison is by text: a rename fails and names the document.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The repository's directories whose files the documents name.
const TOP: [&str; 9] =
    ["src/", "crates/", "tests/", "docs/", "install/", "benches/", "release/", "cni-conf/", ".github/"];
/// Flags of other programs, in spans that begin with the flag.
const OTHERS_FLAGS: [&str; 7] =
    ["--register-with-taints", "--restore-mark", "--save-mark", "--helper", "--validate", "--set", "--lib"];
/// Fields of Kubernetes' own objects.
const OTHERS_FIELDS: [&str; 8] = [
    "status.hostIP",
    "status.podIP",
    "status.loadBalancer",
    "spec.ipam",
    "spec.podCIDRs",
    "spec.unschedulable",
    "spec.externalIPs",
    "spec.loadBalancerIP",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn find(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") {
            find(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}

/// Each document's path and text, without the changelog, which has old names.
fn documents() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root()).expect("the repository").flatten() {
        if entry.path().extension().is_some_and(|e| e == "md") && !entry.path().ends_with("CHANGELOG.md") {
            found.push(entry.path());
        }
    }
    for directory in ["docs", "tests", "cni-conf"] {
        find(&root().join(directory), ".md", &mut found);
    }
    assert!(found.len() > 10, "{found:?}");
    found.into_iter().map(|path| (path.display().to_string(), read(&path))).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All source files in one text.
fn sources(directory: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    find(&root().join(directory), ".rs", &mut found);
    found.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

/// The texts between backticks in a line.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// The longest words of a text that consist of such characters.
fn words(text: &str, allowed: impl Fn(char) -> bool + Copy) -> impl Iterator<Item = &str> {
    text.split(move |c: char| !allowed(c)).filter(|word| !word.is_empty())
}

/// The lines of a document, each with whether it is in a block of code.
fn lines(text: &str) -> impl Iterator<Item = (&str, bool)> {
    text.lines().scan(false, |in_block, line| {
        *in_block ^= line.starts_with("```");
        Some((line, *in_block))
    })
}

fn is_path(span: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "./_-".contains(c);
    TOP.iter().any(|top| span.starts_with(top)) && span.chars().all(plain)
}

#[test]
fn every_file_that_a_document_names_exists() {
    for (document, text) in documents() {
        for path in text.lines().flat_map(spans).filter(|span| is_path(span)) {
            assert!(root().join(path).exists(), "{document} names {path}, which does not exist");
        }
    }
}

/// Links within the repository, and the headings to which they lead.
#[test]
fn every_link_leads_somewhere() {
    let heading = |line: &str| {
        let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        line.trim_start_matches('#').trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
    };
    for (document, text) in documents() {
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() {
                PathBuf::from(&document)
            } else {
                Path::new(&document).parent().expect("a directory").join(file)
            };
            assert!(target.exists(), "{document} links to {link}, which does not exist");
            if let Some(anchor) = anchor {
                let text = read(&target);
                let there = text.lines().filter(|l| l.starts_with('#')).any(|line| heading(line) == anchor);
                assert!(there, "{document} links to {link}: there is no such heading");
            }
        }
    }
}

/// For `src/file.rs` followed by `name()`s in one line, the functions must be in that file.
#[test]
fn every_function_that_a_document_names_is_in_its_file() {
    for (document, text) in documents() {
        for line in text.lines() {
            let mut file = None;
            for span in spans(line) {
                if is_path(span) && span.ends_with(".rs") {
                    file = Some(span);
                } else if let (Some(file), Some(name)) = (file, span.strip_suffix("()")) {
                    let there = read(&root().join(file)).contains(&format!("fn {name}"));
                    assert!(there, "{document} names {name}() in {file}, where it is not");
                }
            }
        }
    }
}

/// Metrics as they are served, without the suffixes of their types.
fn metrics() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (path, text) in sources("src") {
        if path.to_string_lossy().contains("tests") {
            continue;
        }
        let prefix = if path.starts_with(root().join("src/controller")) { "egret" } else { "egret_node" };
        for (call, unit) in [(".register(", ""), (".register_with_unit(", "_seconds")] {
            for rest in text.split(call).skip(1) {
                let Some(name) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next()) else {
                    continue;
                };
                all.insert(format!("{prefix}_{name}{unit}"));
            }
        }
    }
    all
}

fn named_metrics(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let metrics = words(text, is_name).filter(|word| word.starts_with("egret_"));
    metrics.map(|word| word.strip_suffix("_total").unwrap_or(word).to_owned()).collect()
}

#[test]
fn every_metric_that_a_document_names_is_registered() {
    let registered = metrics();
    assert!(registered.len() > 20, "{registered:?}");
    for (document, text) in documents() {
        for name in named_metrics(&text) {
            assert!(registered.contains(&name), "{document} names the metric {name}, which the code does not register");
        }
    }
}

#[test]
fn every_metric_is_documented() {
    let documented = named_metrics(&read(&root().join("docs/operations.md")));
    for name in metrics() {
        assert!(documented.contains(&name), "docs/operations.md does not name the metric {name}; say what it tells");
    }
}

/// A test that waits for a metric that is not registered would wait in vain.
#[test]
fn every_metric_that_a_test_asks_for_is_registered() {
    let registered = metrics();
    for (path, text) in sources("tests").into_iter().chain(sources("benches")) {
        for rest in text.split("\"egret_").skip(1).filter(|_| !path.ends_with("documents.rs")) {
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let name = format!("egret_{}", &rest[..end]);
            let name =
                ["_total", "_count", "_sum", "_bucket"].iter().find_map(|e| name.strip_suffix(e)).unwrap_or(&name);
            // The rest of it is filled in.
            let known = registered.iter().any(|r| r == name || name.ends_with('_') && r.starts_with(name));
            assert!(known, "{} asks for the metric {name}, which the code does not register", path.display());
        }
    }
}

/// The metrics of the dashboard and the alerts. tests/e2e/monitoring.rs evaluates their queries; this test needs no
/// root.
#[test]
fn every_metric_of_the_board_and_of_the_alerts_is_registered() {
    let registered = metrics();
    for file in ["install/grafana/egret.json", "install/prometheus/rules.yaml"] {
        for name in named_metrics(&read(&root().join(file))) {
            let name = ["_bucket", "_count", "_sum"].iter().find_map(|e| name.strip_suffix(e)).unwrap_or(&name);
            assert!(registered.contains(name), "{file} asks for the metric {name}, which the code does not register");
        }
    }
}

/// The flags of `egretd`, as clap derives them from fields with `#[arg(long …)]`.
fn flags() -> BTreeSet<String> {
    let mut all = BTreeSet::from(["--help".to_owned(), "--version".to_owned()]);
    for (_, text) in sources("src/bin") {
        for rest in text.split("#[arg(").skip(1) {
            let (attribute, rest) = rest.split_once(")]\n").unwrap_or_default();
            let name = match attribute.split("long = \"").nth(1) {
                Some(named) => named.split('"').next(),
                None if attribute.contains("long") => rest.split(':').next(),
                None => None,
            };
            all.extend(name.map(|name| format!("--{}", name.trim().trim_start_matches("pub ").replace('_', "-"))));
        }
    }
    all
}

#[test]
fn every_flag_that_a_document_names_exists() {
    let all = flags();
    assert!(all.len() > 20, "{all:?}");
    let is_flag = |c: char| c.is_ascii_lowercase() || c == '-';
    for (document, text) in documents() {
        for (line, in_block) in lines(&text) {
            // A command line of egretd, or a flag alone.
            let block = (in_block && line.starts_with("egretd ")).then(|| line.split(" #").next()).flatten();
            let spans = spans(line).filter(|span| span.starts_with("egretd ") || span.starts_with("--"));
            let spans = spans.filter(|_| !in_block);
            for flag in spans.chain(block).flat_map(|span| words(span, is_flag)).filter(|word| word.starts_with("--")) {
                let known = all.contains(flag) || OTHERS_FLAGS.contains(&flag);
                assert!(known, "{document} names {flag}, which egretd does not have: {line}");
            }
        }
    }
}

/// `egret::node=debug`, as for `--log-level`.
#[test]
fn every_module_whose_log_level_a_text_sets_exists() {
    let mut texts = documents();
    for file in ["install/chart/values.yaml", "tests/snapshots/help.txt", "tests/snapshots/wrong-calls.txt"] {
        texts.push((file.to_owned(), read(&root().join(file))));
    }
    for (name, text) in texts {
        for rest in text.split("egret::").skip(1) {
            let module = words(rest, |c| c.is_ascii_lowercase() || c == '_').next().unwrap_or_default();
            let is_level = rest[module.len()..].starts_with('=');
            assert!(
                !is_level || root().join("src").join(module).is_dir(),
                "{name} names egret::{module}, which is not in src/"
            );
        }
    }
}

#[test]
fn every_target_of_make_that_a_document_names_exists() {
    let makefile = read(&root().join("Makefile"));
    for (document, text) in documents() {
        for (line, in_block) in lines(&text) {
            let block = (in_block && line.starts_with("make ")).then_some(line);
            for call in spans(line).filter(|_| !in_block).chain(block).filter_map(|span| span.strip_prefix("make ")) {
                let target = call.split_whitespace().next().unwrap_or_default();
                let there = makefile.lines().any(|line| line.starts_with(&format!("{target}:")));
                assert!(there, "{document} names `make {target}`, which the Makefile does not have");
            }
        }
    }
}

#[test]
fn every_field_that_a_document_names_is_defined() {
    let definitions = read(&root().join("install/crds.yaml"));
    for (document, text) in documents() {
        for span in text.lines().flat_map(spans).flat_map(|span| words(span, |c| c.is_ascii_alphanumeric() || c == '.'))
        {
            let Some(at) = ["status.", "spec."].iter().find_map(|part| span.find(part)) else { continue };
            let field = &span[at..];
            let name = field.split('.').nth(1).unwrap_or_default();
            let there = definitions.lines().any(|line| line.trim() == format!("{name}:"));
            assert!(there || OTHERS_FIELDS.contains(&field), "{document} names {field}, which no definition has");
        }
    }
}

/// The names of the counters of dropped packets, which are the reasons in the metric. What is not dropped says so.
#[test]
fn every_reason_for_a_dropped_packet_is_documented_and_tested() {
    let ruleset = read(&root().join("src/datapath/ruleset/mod.rs"));
    let counters =
        ruleset.split("pub mod counter {").nth(1).and_then(|rest| rest.split("\n}").next()).expect("counters");
    let dropped = counters.split(';').filter(|constant| !constant.contains("/// Not dropped"));
    let reasons: Vec<&str> =
        dropped.filter_map(|constant| constant.split("&str = \"").nth(1)?.strip_suffix('"')).collect();
    assert!(reasons.len() > 8, "{reasons:?}");
    let (operations, reports) = ("docs/operations.md", "tests/e2e/reports.rs");
    let (documented, tested) = (read(&root().join(operations)), read(&root().join(reports)));
    for reason in reasons {
        assert!(
            documented.contains(&format!("\n| `{reason}` |")),
            "{operations} has no row for the counter `{reason}` in its table of reasons; say what it means and what to do"
        );
        assert!(tested.contains(&format!("\"{reason}\"")), "{reports} does not ask for the reason \"{reason}\"");
    }
}

/// The commands of the help texts in tests/snapshots. A document names each as `name` or `egretd name …`.
#[test]
fn every_command_is_documented() {
    let documents: String = documents().into_iter().map(|(_, text)| text).collect();
    for (program, file) in [("egretd", "help.txt"), ("kubectl egret", "kubectl-egret-help.txt")] {
        let help = read(&root().join("tests/snapshots").join(file));
        let commands = help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
        for name in commands.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help") {
            let named = [format!("`{name}`"), format!("{program} {name}")].iter().any(|text| documents.contains(text));
            assert!(named, "no document names the command {program} {name}; say what it is for");
        }
    }
}
