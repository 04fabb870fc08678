//! The certificate authority of a cluster: signs keyd's server certificate and, stand-alone, the agents'.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _,
};
use warren_model::{NodeName, NodeUid};
use zeroize::Zeroizing;

use super::SERVER_NAME;
use crate::token::sha256;

/// How long certificates are good: ten years. A node's certificate is only worth something while `keyd` knows a
/// Node of that name and UID.
const LIFETIME: std::time::Duration = std::time::Duration::from_secs(10 * 365 * 24 * 3600);

/// Why a certificate cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The PEM of the CA is damaged.
    #[error("the CA certificate is not a PEM certificate")]
    Certificate,
    /// The PEM of the CA's key is damaged, or it is another certificate's.
    #[error("the CA key is not a PEM private key that belongs to the CA certificate")]
    Key,
    /// The agent's request is damaged, asks for what it may not, or its signature is wrong.
    #[error("the certificate request is malformed or not signed by its own key")]
    Request,
    /// The node name or UID cannot stand in a certificate.
    #[error("the node name or UID cannot stand in a certificate")]
    Name,
    /// The crypto library failed.
    #[error("cannot make a certificate: {0}")]
    Crypto(#[from] rcgen::Error),
}

/// CA certificate and key.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key_pem: Zeroizing<String>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({}, key redacted)", hex::encode(self.sha256()))
    }
}

impl Authority {
    /// Makes a new CA. `now_unix_s` is the issuer's clock.
    pub fn generate(now_unix_s: u64) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = params("warren-ca", now_unix_s, LIFETIME * 2);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        Ok(Self {
            certificate: certificate.der().clone(),
            key_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// Reads a CA as [`Self::certificate_pem`] and [`Self::expose_key_pem`] gave it.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|_| AuthorityError::Certificate)?;
        let pair = KeyPair::from_pem(key).map_err(|_| AuthorityError::Key)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|_| AuthorityError::Certificate)?;
        if parsed.public_key().subject_public_key.data.as_ref() != pair.public_key_raw() {
            return Err(AuthorityError::Key);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, pair)?;
        Ok(Self {
            certificate: certificate.clone(),
            key_pem: Zeroizing::new(key.to_owned()),
            issuer,
        })
    }

    /// The CA certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The CA certificate as PEM (`ca.crt` of `warren-trust`).
    pub fn certificate_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The CA's key as PEM, for the file or Secret that keeps it; nowhere else.
    pub fn expose_key_pem(&self) -> &str {
        &self.key_pem
    }

    /// SHA-256 of the certificate, as in join tokens.
    pub fn sha256(&self) -> [u8; 32] {
        sha256(&self.certificate)
    }

    /// A server certificate for [`SERVER_NAME`] with its key and the CA behind it: an enrolling agent knows only
    /// the CA's hash and takes the CA itself from the chain.
    pub fn issue_server(
        &self,
        now_unix_s: u64,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = params(SERVER_NAME, now_unix_s, LIFETIME);
        params.subject_alt_names = vec![rcgen::SanType::DnsName(
            SERVER_NAME.try_into().map_err(|_| AuthorityError::Name)?,
        )];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((vec![certificate.der().clone(), self.certificate.clone()], key))
    }

    /// A client certificate for a node (common name) with a UID (organisational unit). Of the request only the
    /// public key is used: names, usages and extensions are ours to choose. Returns it with its expiry (Unix
    /// seconds).
    pub fn issue_client(
        &self,
        csr_der: &[u8],
        node: &NodeName,
        uid: &NodeUid,
        now_unix_s: u64,
    ) -> Result<(CertificateDer<'static>, u64), AuthorityError> {
        let csr = CertificateSigningRequestDer::from(csr_der);
        let mut request =
            CertificateSigningRequestParams::from_der(&csr).map_err(|_| AuthorityError::Request)?;
        let mut params = params(node.as_str(), now_unix_s, LIFETIME);
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, uid.as_str());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        request.params = params;
        let certificate = request.signed_by(&self.issuer)?;
        Ok((certificate.der().clone(), now_unix_s + LIFETIME.as_secs()))
    }
}

fn params(common_name: &str, now_unix_s: u64, lifetime: std::time::Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    // Starts in 1975 (the default): a clock that jumps back must not lock anybody out.
    params.not_after =
        rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(now_unix_s) + lifetime;
    params.use_authority_key_identifier_extension = true;
    params
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().copied().map(char::from));
        out.push('\n');
    }
    out + &format!("-----END {label}-----\n")
}

/// Whom a client certificate was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertifiedNode {
    /// The node's name.
    pub name: NodeName,
    /// The Node object's UID at enrolment.
    pub uid: NodeUid,
}

/// Reads the names out of a client certificate. The chain must have been verified before.
pub fn certified_node(certificate: &CertificateDer<'_>) -> Option<CertifiedNode> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?;
    let uid = subject.iter_organizational_unit().next()?.as_str().ok()?;
    Some(CertifiedNode {
        name: name.into(),
        uid: uid.into(),
    })
}
