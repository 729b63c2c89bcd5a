//! The server outside that pods ask, as the user names it.

use crate::probe::PORT;
use anyhow::{Context, bail};
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};
use tokio::net::lookup_host;

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Server {
    /// Its addresses, at most one of each family.
    pub addresses: Vec<SocketAddr>,
    /// Its name, for HTTP and TLS.
    pub host: String,
    /// The path of the request.
    pub path: String,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Whether it is somebody else's, named by a URL: it is asked seldom, and over TCP only.
    pub is_reflector: bool,
}

/// What the user has written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written<'t> {
    host: &'t str,
    port: u16,
    path: &'t str,
    tls: bool,
    is_reflector: bool,
}

impl Server {
    /// Looks up what the user has written: `ADDRESS`, `ADDRESS:PORT`, `NAME:PORT`, `https://NAME/PATH`.
    ///
    /// # Errors
    /// It is not understood, or has no address.
    pub async fn find(texts: &[String]) -> anyhow::Result<Self> {
        let mut server: Option<Server> = None;
        for text in texts {
            let written = read(text)?;
            if server.is_some() && written.is_reflector {
                bail!("give one URL, or an IPv4 and an IPv6 address of one server, not {}", texts.join(", "));
            }
            let found: Vec<SocketAddr> = lookup_host((written.host, written.port))
                .await
                .with_context(|| format!("the server {:?} has no address; write its address", written.host))?
                .collect();
            let server = server.get_or_insert_with(|| Server {
                addresses: Vec::new(),
                host: written.host.to_owned(),
                path: written.path.to_owned(),
                tls: written.tls,
                is_reflector: written.is_reflector,
            });
            for address in found {
                if !server.addresses.iter().any(|other| other.is_ipv6() == address.is_ipv6()) {
                    server.addresses.push(address);
                }
            }
        }
        let mut server = server.context("no server is named; write --server ADDRESS")?;
        server.addresses.sort();
        Ok(server)
    }

    /// The server as the user knows it.
    pub fn named(&self) -> String {
        if self.is_reflector {
            return format!("{}://{}{}", if self.tls { "https" } else { "http" }, self.host, self.path);
        }
        self.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

fn read(text: &str) -> anyhow::Result<Written<'_>> {
    let hint = "write ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, NAME:PORT, or a URL";
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (Some(scheme), rest),
        Some((scheme, _)) => bail!("{scheme:?} is not spoken; {hint}"),
        None => (None, text),
    };
    let (host, path) = match rest.find('/') {
        Some(at) if scheme.is_some() => rest.split_at(at),
        Some(_) => bail!("{text:?} is no address; {hint}"),
        None => (rest, "/"),
    };
    let tls = scheme == Some("https");
    let usual = match scheme {
        Some("https") => 443,
        Some(_) => 80,
        None => PORT,
    };
    let unbracketed = |host: &str| host.trim_start_matches('[').trim_end_matches(']').len();
    let (host, port) = match host.rsplit_once(':') {
        _ if host.parse::<IpAddr>().is_ok() => (host, usual),
        _ if host.starts_with('[') && host.ends_with(']') => (host, usual),
        Some((host, port)) => (host, port.parse().with_context(|| format!("{port:?} is no port; {hint}"))?),
        None => (host, usual),
    };
    if unbracketed(host) == 0 {
        bail!("{text:?} names no host; {hint}");
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok(Written { host, port, path, tls, is_reflector: scheme.is_some() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_is_an_address_a_pair_or_a_url() {
        let found = async |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            Server::find(&texts).await.map(|server| server.named()).map_err(|e| format!("{e:#}"))
        };
        assert_eq!(found(&["192.0.2.100"]).await.unwrap(), "192.0.2.100:8080");
        assert_eq!(found(&["2001:db8::1"]).await.unwrap(), "[2001:db8::1]:8080");
        let both = found(&["[2001:db8::1]:81", "192.0.2.100:81"]).await.unwrap();
        assert_eq!(both, "192.0.2.100:81, [2001:db8::1]:81");
        assert_eq!(found(&["https://192.0.2.1/ip"]).await.unwrap(), "https://192.0.2.1/ip");
        for (wrong, words) in [
            ("ftp://192.0.2.1", "not spoken"),
            ("192.0.2.1:http", "no port"),
            ("192.0.2.1/x", "no address"),
            (":80", "names no host"),
        ] {
            let e = found(&[wrong]).await.unwrap_err();
            assert!(e.contains(words), "{wrong}: {e}");
        }
        assert!(found(&["192.0.2.1", "http://192.0.2.1"]).await.unwrap_err().contains("give one URL"));
    }
}
