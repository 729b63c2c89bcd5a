//! A daemon's Prometheus text, taken apart.

use super::host::Host;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// One line of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name, with its suffix.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(pub Vec<Sample>);

impl Metrics {
    /// The sum of the samples of this name that bear at least these labels; `None` if there is none.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let fits = |s: &&Sample| {
            s.name == name && labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|found| found == v))
        };
        let mut found = self.0.iter().filter(fits).map(|s| s.value).peekable();
        found.peek()?;
        Some(found.sum())
    }

    /// The packets that a node's rules dropped for this reason; `None` if it counts none such.
    pub fn dropped(&self, reason: &str) -> Option<f64> {
        self.get("egret_node_dropped_packets_total", &[("reason", reason)])
    }

    /// Parses the text format, <https://prometheus.io/docs/instrumenting/exposition_formats/>.
    pub fn parse(text: &str) -> Metrics {
        Metrics(text.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()).map(parse_line).collect())
    }
}

fn parse_line(line: &str) -> Sample {
    let bad = || -> ! { panic!("not a line of Prometheus' text format: {line}") };
    let (key, rest) = match line.find(['{', ' ']) {
        Some(at) => line.split_at(at),
        None => bad(),
    };
    let mut labels = BTreeMap::new();
    let mut value = rest;
    if let Some(mut inside) = rest.strip_prefix('{') {
        loop {
            inside = inside.trim_start_matches(',');
            if let Some(after) = inside.strip_prefix('}') {
                value = after;
                break;
            }
            let Some((name, after)) = inside.split_once("=\"") else { bad() };
            let mut text = String::new();
            let mut characters = after.char_indices();
            let end = loop {
                match characters.next() {
                    Some((at, '"')) => break at + 1,
                    Some((_, '\\')) => match characters.next() {
                        Some((_, 'n')) => text.push('\n'),
                        Some((_, other)) => text.push(other),
                        None => bad(),
                    },
                    Some((_, other)) => text.push(other),
                    None => bad(),
                }
            };
            labels.insert(name.to_owned(), text);
            inside = &after[end..];
        }
    }
    let Some(value) = value.split_whitespace().next().and_then(|v| v.parse().ok()) else { bad() };
    Sample { name: key.to_owned(), labels, value }
}

/// One GET to a server inside the host: status and body.
///
/// # Errors
/// Nobody listens, or it does not answer in two seconds.
pub fn get(host: &Host, server: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let patience = Duration::from_secs(2);
    let mut stream = host.within(|| TcpStream::connect_timeout(&server, patience))?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("not HTTP: {head}")))?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.to_owned() }))
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || size > rest.len() {
            break;
        }
        whole += &rest[..size];
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}
