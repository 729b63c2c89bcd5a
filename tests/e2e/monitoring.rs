//! The Grafana dashboard and the alerts in `install/`: a real Prometheus scrapes real daemons, and every query finds
//! its metrics. Needs root and Debian's prometheus.

use lab::daemon::Daemon;
use lab::scene::{assert_blocked, assert_leaves_by_egress};
use lab::{EXT4, Host, Lab, VISITOR, machine, manifests};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

const PROMETHEUS: &str = "/usr/bin/prometheus";
/// The address of the lab's daemons for metrics.
const METRICS: &str = "127.0.0.1:7870";
/// The prefix of all of Egret's metrics.
const PREFIX: &str = concat!("egret", "_");
/// A policy of a gateway that does not exist.
const BROKEN: &str = "apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: broken, namespace: shop}\n\
                      spec: {gateway: nowhere, podSelector: {matchLabels: {app: broken}}}\n";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All expressions of the dashboard, with the variables filled in, and those of the alerts, each with its name.
fn expressions() -> Vec<(String, String)> {
    let read = |file: &str| std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let board: Value = serde_json::from_str(&read("install/grafana/egret.json")).expect("JSON");
    let mut found = Vec::new();
    for panel in board["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().expect("a title");
            let expression = target["expr"].as_str().expect("an expression");
            found.push((title.to_owned(), expression.replace("$__rate_interval", "30s").replace("$node", ".*")));
        }
    }
    let rules: Value = serde_saphyr::from_str(&read("install/prometheus/rules.yaml")).expect("YAML");
    for rule in rules["groups"][0]["rules"].as_array().expect("rules") {
        let text = |field: &str| rule[field].as_str().expect("a text").to_owned();
        found.push((text("alert"), text("expr")));
    }
    assert!(found.len() > 40, "{}", found.len());
    found
}

/// A selector of an expression: a metric with its matchers, each a label, an operator and a value.
#[derive(Debug, PartialEq)]
struct Selector {
    metric: String,
    matchers: Vec<(String, String, String)>,
}

fn selectors(expression: &str) -> Vec<Selector> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(at) = rest.find(PREFIX) {
        rest = &rest[at..];
        let (metric, after) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
        let inside = after.strip_prefix('{').and_then(|text| text.split_once('}')).map_or("", |(inside, _)| inside);
        let matcher = |text: &str| {
            let (label, text) = text.split_at(text.find(|c| !is_name(c)).expect("an operator"));
            let (operator, value) = text.split_once('"').expect("a value in quotes");
            (label.to_owned(), operator.to_owned(), value.trim_end_matches('"').to_owned())
        };
        let matchers = inside.split(',').filter(|text| !text.is_empty()).map(matcher).collect();
        found.push(Selector { metric: metric.to_owned(), matchers });
        rest = after;
    }
    found
}

/// The labels that an expression groups by.
fn groupings(expression: &str) -> BTreeSet<String> {
    let lists = expression.split("by (").skip(1).filter_map(|text| text.split(')').next());
    lists.flat_map(|list| list.split(',')).map(|label| label.trim().to_owned()).collect()
}

/// Makes a daemon's metrics reachable at a port of Prometheus' host.
fn forward(from: &Host, port: u16, to: &Host) {
    let listener = from.within(|| TcpListener::bind(("127.0.0.1", port))).expect("listen");
    let namespaces = to.namespaces();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = namespaces.within(|| TcpStream::connect(METRICS));
            let _ = server.and_then(|server| answer(client, server));
        }
    });
}

/// Handles one request. The rest of the client's data is ignored.
fn answer(mut client: TcpStream, mut server: TcpStream) -> std::io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(2)))?;
    server.set_read_timeout(Some(Duration::from_secs(5)))?;
    let _ = machine::uninterrupted(|| client.read(&mut [0; 4096]))?;
    let accept = "application/openmetrics-text;version=1.0.0";
    write!(server, "GET /metrics HTTP/1.1\r\nHost: node\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")?;
    std::io::copy(&mut server, &mut client).map(drop)
}

/// The configuration, with the labels that the PodMonitors set.
fn configuration(nodes: &[(&str, u16)]) -> String {
    let target =
        |(name, port): &(&str, u16)| format!("  - targets: ['127.0.0.1:{port}']\n    labels: {{node: {name}}}\n");
    let nodes: String = nodes.iter().map(target).collect();
    let rules = root().join("install/prometheus/rules.yaml");
    format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n\
         - job_name: egret-system/egret-node\n  static_configs:\n{nodes}\
         - job_name: egret-system/egret-controller\n  static_configs:\n  - targets: ['{METRICS}']\n    labels: {{node: n1}}\n",
        rules.display()
    )
}

/// Starts Prometheus in the fabric's namespace, where the controller is too.
fn start_prometheus(lab: &Lab) -> Daemon {
    let host = lab.host("fab");
    let nodes = [("n1", 9101), ("n2", 9102), ("g1", 9103), ("g2", 9104)];
    nodes.iter().for_each(|(name, port)| forward(host, *port, lab.node(name)));
    let file = lab.directory().join("prometheus.yaml");
    std::fs::write(&file, configuration(&nodes)).expect("write its configuration");
    let arguments = [
        format!("--config.file={}", file.display()),
        format!("--storage.tsdb.path={}", lab.directory().join("prometheus").display()),
        "--web.listen-address=127.0.0.1:9090".to_owned(),
        "--log.level=warn".to_owned(),
    ];
    assert!(Path::new(PROMETHEUS).exists(), "no {PROMETHEUS}; tests/setup.sh installs it");
    let log = lab.directory().join("prometheus.log");
    Daemon::start("prometheus", host, Path::new(PROMETHEUS), arguments.to_vec(), log)
}

/// The result of a query: the labels of each series.
fn query(lab: &Lab, expression: &str) -> Result<Vec<BTreeMap<String, String>>, String> {
    let parameter = format!("query={expression}");
    let url = "http://127.0.0.1:9090/api/v1/query";
    let output = lab.host("fab").try_run(["curl", "-sG", url, "--data-urlencode", &parameter]);
    let answer: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}: {output:?}"))?;
    if answer["status"] != "success" {
        return Err(answer["error"].to_string());
    }
    let series = answer["data"]["result"].as_array().cloned().unwrap_or_default();
    Ok(series.into_iter().filter_map(|one| serde_json::from_value(one["metric"].clone()).ok()).collect())
}

/// The selectors of an expression that no scraped series matches.
fn missing(lab: &Lab, expression: &str) -> Vec<String> {
    let mut missing = Vec::new();
    let mut labels = BTreeSet::from(["le".to_owned()]);
    for selector in selectors(expression) {
        let series = query(lab, &selector.metric).unwrap_or_else(|e| panic!("{}: {e}", selector.metric));
        if series.is_empty() {
            missing.push(format!("metric {}", selector.metric));
        }
        labels.extend(series.iter().flat_map(|one| one.keys().cloned()));
        for (label, operator, value) in &selector.matchers {
            let values: BTreeSet<&str> = series.iter().filter_map(|one| one.get(label)).map(String::as_str).collect();
            let wanted: Vec<&str> = match operator.as_str() {
                "=" => vec![value],
                "=~" if value != ".*" => value.split('|').collect(),
                _ => Vec::new(),
            };
            if values.is_empty() || wanted.iter().any(|value| !values.contains(value)) {
                missing.push(format!("{}{{{label}{operator}{value:?}}} among {values:?}", selector.metric));
            }
        }
    }
    missing.extend(groupings(expression).difference(&labels).map(|label| format!("label {label}")));
    missing
}

#[test]
fn every_query_of_the_dashboard_and_of_the_alerts_finds_its_metrics() {
    let lab = Lab::scene();
    // One node maintains its runtime's configuration, as in a cluster.
    let directory = lab.directory().join("cni");
    for name in ["conf", "bin"] {
        std::fs::create_dir_all(directory.join(name)).expect("make a directory");
    }
    lab.daemon("n1").term();
    let mut arguments = lab.node_daemon_arguments("n1");
    for (flag, name) in [("--cni-conf-dir", "conf"), ("--cni-bin-dir", "bin")] {
        arguments.extend([flag.to_owned(), directory.join(name).display().to_string()]);
    }
    lab.start_daemon("n1", lab.node("n1"), arguments);
    lab.wait_ready("n1");
    // Traffic, a pod without an egress IP, and a rejected policy.
    lab.write_manifest("broken.yaml", BROKEN);
    let gateway = manifests::gateway("default", &["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"]);
    lab.write_manifest("gateway.yaml", &format!("{gateway}  probes: [{{ icmp: {EXT4} }}]\n"));
    let visitor = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&visitor);
    // Source ports are measured from a tenth of a range on: 52 of 1 to 511. They are counted every 30 s.
    lab.nodes().iter().for_each(|node| node.sysctl(&["net.netfilter.nf_conntrack_udp_timeout=300"]));
    visitor.udp_from_ports(1..=60, (EXT4, 9).into());
    let broken = lab.add_pod("n1", "shop", "broken", &[("app", "broken")]);
    assert_blocked(&broken);
    let prometheus = start_prometheus(&lab);
    lab.wait_until("all daemons are scraped several times", Duration::from_secs(60), || {
        query(&lab, "count_over_time(up[1m]) >= 4 and up == 1").is_ok_and(|all| all.len() == 5)
    });
    lab.wait_until("source ports are counted and scraped", Duration::from_secs(60), || {
        query(&lab, &format!("{PREFIX}node_source_ports_used == 60")).is_ok_and(|all| all.len() == 1)
    });
    for (name, expression) in expressions() {
        let result = query(&lab, &expression).unwrap_or_else(|e| panic!("{name}: {expression}: {e}"));
        let missing = missing(&lab, &expression);
        assert!(missing.is_empty(), "{name}: {expression}: there is no {}", missing.join(", no "));
        let is_alert = name.starts_with("Egret");
        assert!(is_alert || !result.is_empty(), "{name}: {expression} finds nothing");
    }
    // Prometheus is about to alert about the problems of this lab.
    lab.wait_until("the rejected policy is pending as an alert", Duration::from_secs(20), || {
        query(&lab, "ALERTS{alertname=\"EgretPolicyRejected\"}").is_ok_and(|all| all.len() == 1)
    });
    prometheus.term();
}

/// The test above fails at a wrong name because it parses expressions.
#[test]
fn expressions_are_parsed() {
    let text = format!("sum by (node, le) (rate({PREFIX}a_total{{reason=~\"x|y\",node=\"n\"}}[5m])) / {PREFIX}b");
    let matcher = |label: &str, operator: &str, value: &str| (label.to_owned(), operator.to_owned(), value.to_owned());
    let matchers = vec![matcher("reason", "=~", "x|y"), matcher("node", "=", "n")];
    let first = Selector { metric: format!("{PREFIX}a_total"), matchers };
    assert_eq!(selectors(&text), [first, Selector { metric: format!("{PREFIX}b"), matchers: Vec::new() }]);
    let grouped = groupings("topk(3, sum by (node, le) (x)) + sum by (a) (y)");
    assert_eq!(grouped.into_iter().collect::<Vec<_>>(), ["a", "le", "node"]);
}

/// Each alert fires in its case only: `tests/prometheus/alerts.yaml`.
#[test]
fn every_alert_is_tested_by_promtool() {
    let run = |arguments: &[&str]| {
        let output = Command::new("promtool").args(arguments).current_dir(root()).output();
        let output = output.unwrap_or_else(|e| panic!("promtool: {e}; tests/setup.sh installs it"));
        let text = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&text));
    };
    run(&["check", "rules", "install/prometheus/rules.yaml"]);
    run(&["test", "rules", "tests/prometheus/alerts.yaml"]);
    let text = std::fs::read_to_string(root().join("tests/prometheus/alerts.yaml")).expect("the tests");
    let tests: Value = serde_saphyr::from_str(&text).expect("YAML");
    let tested = |fires: bool| -> BTreeSet<String> {
        let all = tests["tests"].as_array().expect("tests").iter();
        let rules = all.flat_map(|test| test["alert_rule_test"].as_array().cloned().unwrap_or_default());
        let wanted = rules.filter(|rule| rule["exp_alerts"].as_array().is_some_and(|all| all.is_empty() != fires));
        wanted.filter_map(|rule| rule["alertname"].as_str().map(str::to_owned)).collect()
    };
    let names = expressions().into_iter().map(|(name, _)| name);
    let alerts: BTreeSet<String> = names.filter(|name| name.starts_with("Egret")).collect();
    assert_eq!((tested(true), tested(false)), (alerts.clone(), alerts), "alerts that fire, and that stay silent");
}
