//! Asks a server outside the cluster which source address it sees, and is such a server.
//!
//! `kubectl egret test` starts pods that run [`client`] and reads their logs: one [`ProbeRecord`] a line. [`server`] is for
//! the user's host outside. Every server that answers an HTTP request with the address of the client does as well.

pub mod arguments;
pub mod client;
pub mod server;
mod tls;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// The port of the server, TCP and UDP, if nothing else is said.
pub const PORT: u16 = 8080;

/// How a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ProbeMethod {
    /// An HTTP request on a TCP connection of its own.
    Tcp,
    /// A datagram from a socket of its own.
    Udp,
    /// HTTP requests on one TCP connection.
    Held,
}

impl fmt::Display for ProbeMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProbeMethod::Tcp => "TCP",
            ProbeMethod::Udp => "UDP",
            ProbeMethod::Held => "one TCP connection",
        })
    }
}

/// One request and its answer, or the lack of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeRecord {
    /// When it was asked, milliseconds since the client began.
    pub at: u64,
    /// How long the answer took, milliseconds.
    pub took: u64,
    /// How it was asked.
    pub method: ProbeMethod,
    /// Whether it was asked over IPv6.
    pub ipv6: bool,
    /// How many TCP segments this network namespace had sent again by then.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resent: u64,
    /// The source address that the server saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saw: Option<IpAddr>,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The first address in a server's answer: `192.0.2.50`, `192.0.2.50:41000`, `{"ip": "2001:db8::50"}`.
pub fn address_in(text: &str) -> Option<IpAddr> {
    let words = text.split(|c: char| !(c.is_ascii_hexdigit() || c == '.' || c == ':'));
    words
        .filter_map(|word| {
            let word = word.trim_matches('.');
            let with_port =
                || word.rsplit_once(':').filter(|(ip, _)| !ip.contains(':')).and_then(|(ip, _)| ip.parse().ok());
            word.parse::<IpAddr>().ok().or_else(with_port).map(|ip| ip.to_canonical())
        })
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_what_servers_answer() {
        let wanted: IpAddr = "192.0.2.50".parse().unwrap();
        for text in [
            "192.0.2.50\n",
            "192.0.2.50:41000",
            "::ffff:192.0.2.50",
            "{\"ip\": \"192.0.2.50\"}",
            "Your IP: 192.0.2.50.",
        ] {
            assert_eq!(address_in(text), Some(wanted), "{text}");
        }
        for text in ["2001:db8::50\n", "[2001:db8::50]:41000", "{\"a\":1,\"ip\":\"2001:db8::50\"}"] {
            assert_eq!(address_in(text), Some("2001:db8::50".parse().unwrap()), "{text}");
        }
        assert_eq!(address_in("<html>nothing here</html>"), None);
    }

    #[test]
    fn an_answer_is_a_short_line() {
        let answer = ProbeRecord {
            at: 12,
            took: 3,
            method: ProbeMethod::Udp,
            ipv6: true,
            resent: 0,
            saw: None,
            error: Some("none".to_owned()),
        };
        let line = serde_json::to_string(&answer).unwrap();
        assert_eq!(line, r#"{"at":12,"took":3,"method":"udp","ipv6":true,"error":"none"}"#);
        assert_eq!(serde_json::from_str::<ProbeRecord>(&line).unwrap(), answer);
    }
}
