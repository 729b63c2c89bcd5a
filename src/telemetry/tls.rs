//! TLS for the metrics endpoint with authentication: a token must not cross a network in the clear.
//!
//! The certificate is created at the start and self-signed, as controller-runtime's is. Scrapers cannot verify it
//! (`insecure_skip_verify`), so it protects the token from an eavesdropper, but not from a man in the middle.

use anyhow::Context;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// An acceptor with a new key and a certificate for `localhost`.
///
/// # Errors
/// The system gives no random numbers, or the certificate cannot be created.
pub fn self_signed() -> anyhow::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).context("a certificate for the metrics")?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    // Name the provider: a process may have several, and then there is no default one.
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into()))
        .context("TLS for the metrics")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
