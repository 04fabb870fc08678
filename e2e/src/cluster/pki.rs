//! The cluster's certificates and kubeconfigs.

use std::{fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::json;

/// A certificate authority that writes into one folder.
pub(super) struct Pki<'a> {
    folder: &'a Path,
    ca: CertifiedIssuer<'static, KeyPair>,
    /// Where clients find the API server.
    server: String,
}

impl<'a> Pki<'a> {
    /// Makes the authority (`ca.crt`, `ca.key`) and the key that signs service-account tokens (`sa.key`, `sa.pub`).
    pub(super) fn new(folder: &'a Path, server: String) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("kube-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        write(&folder.join("ca.key"), &key.serialize_pem())?;
        let ca = CertifiedIssuer::self_signed(params, key)?;
        write(&folder.join("ca.crt"), &ca.pem())?;
        let tokens = KeyPair::generate()?;
        write(&folder.join("sa.key"), &tokens.serialize_pem())?;
        write(&folder.join("sa.pub"), &tokens.public_key_pem())?;
        Ok(Self { folder, ca, server })
    }

    /// A certificate for both ends, as `FILE.crt` and `FILE.key`.
    pub(super) fn certificate(
        &self,
        file: &str,
        common_name: &str,
        organization: Option<&str>,
        names: &[&str],
        addresses: &[IpAddr],
    ) -> Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(common_name, organization);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        for name in names {
            params
                .subject_alt_names
                .push(SanType::DnsName((*name).try_into()?));
        }
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        write(&self.folder.join(format!("{file}.key")), &key.serialize_pem())?;
        write(&self.folder.join(format!("{file}.crt")), &certificate.pem())
    }

    /// A client certificate inside a kubeconfig, `FILE.conf`.
    pub(super) fn kubeconfig(&self, file: &str, user: &str, group: Option<&str>) -> Result<()> {
        self.certificate(file, user, group, &[], &[])?;
        let read = |name: String| fs::read(self.folder.join(name)).map(|content| STANDARD.encode(content));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {
                "server": self.server,
                "certificate-authority-data": read("ca.crt".into())?,
            }}],
            "users": [{"name": user, "user": {
                "client-certificate-data": read(format!("{file}.crt"))?,
                "client-key-data": read(format!("{file}.key"))?,
            }}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
        });
        write(&self.folder.join(format!("{file}.conf")), &config.to_string())
    }
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
