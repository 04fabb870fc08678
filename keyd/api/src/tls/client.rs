//! The agents' side.

use std::{fmt, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::CryptoProvider,
    server::ParsedCertificate,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject as _,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

use super::{SERVER_NAME, provider};
use crate::{
    proto::{EnrollRequest, keyd_client::KeydClient},
    snapshot::{RootChain, SnapshotRoot},
    token::{JoinToken, sha256},
};

/// How long connecting and the TLS handshake may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why `keyd` cannot be reached or trusted.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection, or the handshake failed.
    #[error("cannot connect to keyd at {address}: {reason}")]
    Connect {
        /// host:port.
        address: String,
        /// What happened.
        reason: String,
    },
    /// The trust material is damaged.
    #[error("{0}")]
    Trust(String),
    /// `keyd` refused the enrolment.
    #[error("keyd refused the enrolment: {0}")]
    Refused(String),
    /// keyd's answer does not fit the join token.
    #[error("keyd's answer to the enrolment is not usable: {0}")]
    Answer(&'static str),
}

/// How the agent knows that it talks to its cluster's `keyd`.
#[derive(Debug, Clone)]
pub enum Trust {
    /// By the CA's certificate.
    Ca(CertificateDer<'static>),
    /// By the CA's SHA-256 from the join token; the CA itself comes with the server's chain.
    Pinned([u8; 32]),
}

impl Trust {
    /// Reads the CA from PEM (`ca.crt`).
    pub fn from_pem(pem: &str) -> Result<Self, ConnectError> {
        CertificateDer::from_pem_slice(pem.as_bytes())
            .map(Self::Ca)
            .map_err(|_| ConnectError::Trust("ca.crt holds no PEM certificate".into()))
    }
}

/// A client certificate with its key.
#[derive(Clone)]
pub struct ClientIdentity {
    /// DER of the certificate.
    pub certificate_der: Vec<u8>,
    /// PKCS #8 DER of the key; secret.
    pub key_der: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(redacted)")
    }
}

/// What enrolment gives an agent, to be kept on disk (the identity 0600).
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// Client certificate and key.
    pub identity: ClientIdentity,
    /// The CA's certificate, DER; its hash is the join token's.
    pub ca_der: Vec<u8>,
    /// The keys that sign snapshots.
    pub roots: RootChain,
    /// When the certificate expires by keyd's clock, Unix milliseconds.
    pub not_after_unix_ms: i64,
}

impl Enrolment {
    /// The key that signs snapshots now.
    pub fn root(&self) -> SnapshotRoot {
        self.roots.newest().key
    }
}

/// Connects to `keyd` at `host:port`. The name in its certificate is [`SERVER_NAME`] whatever the address. `now_unix_s`: a time
/// that has been reached, by somebody's word who is believed; `None` where nothing is known.
/// Keepalive finds a dead peer within 20 s.
pub async fn connect(
    address: &str,
    trust: &Trust,
    identity: Option<&ClientIdentity>,
    now_unix_s: Option<u64>,
) -> Result<Channel, ConnectError> {
    connect_with(address, client_config(trust, identity, now_unix_s)?).await
}

/// As [`connect`], with a TLS configuration of the caller's own (tests of hostile clients).
pub async fn connect_with(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ConnectError> {
    let error = |reason: String| ConnectError::Connect {
        address: address.to_owned(),
        reason,
    };
    let target = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let (target, tls) = (target.clone(), TlsConnector::from(config.clone()));
        async move {
            let tcp = TcpStream::connect(&target).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
            tls.connect(name, tcp).await.map(TokioIo::new)
        }
    });
    // The connector makes the TLS; tonic must not try to.
    Endpoint::from_static("http://keyd.warren.internal")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|source| error(root_cause(&source)))
}

/// tonic says "transport error" and hides the sentence that matters at the end of the chain.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Makes a fresh key for a client certificate, PKCS #8 DER, and its request, DER.
pub fn generate_client_key() -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), ConnectError> {
    let trust = |error: rcgen::Error| ConnectError::Trust(format!("cannot make a key: {error}"));
    let key = KeyPair::generate().map_err(trust)?;
    let request = CertificateParams::default()
        .serialize_request(&key)
        .map_err(trust)?;
    Ok((Zeroizing::new(key.serialize_der()), request.der().to_vec()))
}

/// Enrols with a join token: pins keyd's CA by the token's hash, sends the token's secret and a request for a
/// fresh key, checks what comes back.
pub async fn enroll(address: &str, token: &JoinToken) -> Result<Enrolment, ConnectError> {
    let (key_der, csr_der) = generate_client_key()?;
    let channel = connect(address, &Trust::Pinned(*token.ca_sha256()), None, None).await?;
    let request = EnrollRequest {
        token: token.expose_secret().to_owned(),
        node_name: token.node().to_string(),
        csr_der,
    };
    let response = KeydClient::new(channel)
        .enroll(request)
        .await
        .map_err(|status| ConnectError::Refused(status.message().to_owned()))?
        .into_inner();
    if sha256(&response.ca_der) != *token.ca_sha256() {
        return Err(ConnectError::Answer("its CA is not the join token's"));
    }
    let roots = RootChain::parse(response.roots.unwrap_or_default().roots)
        .map_err(|_| ConnectError::Answer("its snapshot roots are not a chain"))?;
    Ok(Enrolment {
        identity: ClientIdentity {
            certificate_der: response.certificate_der,
            key_der,
        },
        ca_der: response.ca_der,
        roots,
        not_after_unix_ms: response.not_after_unix_ms,
    })
}

/// TLS 1.3 with the verifier that the module documentation describes, and an optional client certificate.
pub fn client_config(
    trust: &Trust,
    identity: Option<&ClientIdentity>,
    now_unix_s: Option<u64>,
) -> Result<Arc<ClientConfig>, ConnectError> {
    let damaged = |what: &str, error: &dyn fmt::Display| ConnectError::Trust(format!("{what}: {error}"));
    let verifier = Verifier {
        trust: trust.clone(),
        now_unix_s,
        provider: provider(),
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| damaged("TLS 1.3 is not available", &error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = vec![CertificateDer::from(identity.certificate_der.clone())];
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key_der.to_vec()));
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| damaged("the client certificate and its key are not usable", &error))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Verifies chain, name and usage at a time that is known to have been reached (see the module's documentation for why not at
/// the wall clock's).
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    now_unix_s: Option<u64>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _wall_clock: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let anchor = match &self.trust {
            Trust::Ca(ca) => ca.clone(),
            Trust::Pinned(hash) => intermediates
                .iter()
                .find(|certificate| sha256(certificate) == *hash)
                .ok_or_else(unknown)?
                .clone()
                .into_owned(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(anchor)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &roots,
            intermediates,
            self.time(end_entity)?,
            self.provider.signature_verification_algorithms.all,
        )?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl Verifier {
    /// The time that is known, at least the begin of the certificate's validity: within it, where nothing is known.
    fn time(&self, certificate: &CertificateDer<'_>) -> Result<UnixTime, rustls::Error> {
        let bad = rustls::Error::InvalidCertificate(rustls::CertificateError::BadEncoding);
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else {
            return Err(bad);
        };
        let begin = u64::try_from(parsed.validity().not_before.timestamp()).map_err(|_| bad)?;
        let seconds = self.now_unix_s.unwrap_or_default().max(begin);
        Ok(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}
