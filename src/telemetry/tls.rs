//! TLS for the metrics, where who reads them is asked: a token must not cross a network in the clear.
//!
//! The certificate is made at the start and signed by itself, as controller-runtime's is: scrapers cannot verify it
//! (`insecure_skip_verify`). It keeps a token from who listens, not from who stands in between.

use anyhow::Context;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// With a new key and a certificate for `localhost`.
///
/// # Errors
/// There is no randomness, or the certificate cannot be made.
pub fn self_signed() -> anyhow::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).context("a certificate for the metrics")?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    // The provider by name: a process may have several, and then there is no default one.
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into()))
        .context("TLS for the metrics")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
