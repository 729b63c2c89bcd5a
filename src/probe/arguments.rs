//! The command lines of client and server, the same in every program that has them.

use super::client::{self, Options};
use super::{PORT, ProbeMethod, server};
use anyhow::bail;
use clap::Args;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// The server.
#[derive(Args, Clone, Debug)]
pub struct ServerArguments {
    /// Port, TCP and UDP
    #[arg(long, default_value_t = PORT)]
    pub port: u16,
    /// Address to listen on, for hosts with several; may be given several times [default: all, IPv4 and IPv6]
    #[arg(long)]
    pub address: Vec<IpAddr>,
}

impl ServerArguments {
    /// Serves.
    ///
    /// # Errors
    /// An address cannot be listened on.
    pub async fn run(self) -> anyhow::Result<()> {
        server::run(&self.address, self.port).await
    }
}

/// The client.
#[derive(Args, Clone, Debug)]
pub struct ProbeArguments {
    /// Addresses of the server, each with its port
    #[arg(long, required = true, value_delimiter = ',')]
    pub to: Vec<SocketAddr>,
    /// Name of the server, for HTTP and TLS
    #[arg(long)]
    pub host: String,
    /// Path of the HTTP request
    #[arg(long, default_value = "/")]
    pub path: String,
    /// Speak TLS; the server's certificate is not verified
    #[arg(long)]
    pub tls: bool,
    /// How to ask
    #[arg(long, value_delimiter = ',', value_enum, default_value = "tcp")]
    pub method: Vec<ProbeMethod>,
    /// Milliseconds from one request to the next
    #[arg(long, default_value_t = 100)]
    pub interval: u64,
    /// Milliseconds to wait for an answer
    #[arg(long, default_value_t = 2000)]
    pub patience: u64,
    /// How many requests to ask; 0: no end
    #[arg(long, default_value_t = 0)]
    pub count: u64,
}

impl ProbeArguments {
    /// Asks, and prints the answers.
    ///
    /// # Errors
    /// The path is none.
    pub async fn run(self) -> anyhow::Result<()> {
        if !self.path.starts_with('/') {
            bail!("{:?} is no path; it begins with /", self.path);
        }
        let options = Options {
            to: self.to,
            host: self.host,
            path: self.path,
            tls: self.tls,
            methods: self.method,
            interval: Duration::from_millis(self.interval),
            patience: Duration::from_millis(self.patience),
            count: self.count,
        };
        client::run(options, Arc::new(client::print)).await;
        Ok(())
    }
}
