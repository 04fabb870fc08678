//! Handshakes over an in-memory pipe.

use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use rustls_pki_types::ServerName;

use super::{
    Authority, ClientIdentity, SERVER_NAME, Trust, certified_node,
    client::{client_config, generate_client_key},
    server_config,
};

const NOW: u64 = 1_800_000_000;

fn server(authority: &Authority) -> Arc<ServerConfig> {
    let (chain, key) = authority.issue_server(NOW).unwrap();
    server_config(authority.certificate(), chain, key, || NOW).unwrap()
}

fn client_of(authority: &Authority) -> ClientIdentity {
    let (key_der, csr) = generate_client_key().unwrap();
    let (certificate, _) = authority
        .issue_client(&csr, &"node1".into(), &"uid1".into(), NOW)
        .unwrap();
    ClientIdentity {
        certificate_der: certificate.to_vec(),
        key_der,
    }
}

/// Runs a handshake in memory; the error is whichever side's comes first.
fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: &'static str,
) -> Result<ServerConnection, rustls::Error> {
    let mut client = ClientConnection::new(client, ServerName::try_from(name).unwrap()).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..8 {
        let mut bytes = vec![];
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut input = bytes.as_slice();
        while !input.is_empty() {
            server.read_tls(&mut input).unwrap();
            server.process_new_packets()?;
        }
        let mut bytes = vec![];
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut input = bytes.as_slice();
        while !input.is_empty() {
            client.read_tls(&mut input).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(server)
}

#[test]
fn ca_and_pin_both_work_and_client_certificates_name_the_node() {
    let authority = Authority::generate(NOW).unwrap();
    let identity = client_of(&authority);
    for trust in [
        Trust::Ca(authority.certificate().clone()),
        Trust::Pinned(authority.sha256()),
    ] {
        let anonymous = client_config(&trust, None, None).unwrap();
        let server_end = handshake(anonymous, server(&authority), SERVER_NAME).unwrap();
        assert!(server_end.peer_certificates().is_none());

        let known = client_config(&trust, Some(&identity), None).unwrap();
        let server_end = handshake(known, server(&authority), SERVER_NAME).unwrap();
        let node = certified_node(&server_end.peer_certificates().unwrap()[0]).unwrap();
        assert_eq!((node.name.as_str(), node.uid.as_str()), ("node1", "uid1"));
    }
}

const YEAR: u64 = 365 * 86_400;

#[test]
fn the_servers_certificate_ends_by_signed_time_not_by_any_clock() {
    // keyd's certificate lies wholly in the past of this machine's clock: 1990 to 2000.
    let authority = Authority::generate(315_360_000).unwrap();
    let issued = 631_152_000;
    let (chain, key) = authority.issue_server(issued).unwrap();
    let old = server_config(authority.certificate(), chain, key, || NOW).unwrap();
    let trust = Trust::Ca(authority.certificate().clone());
    // Nothing is known, or something long ago: nobody is locked out.
    for known in [None, Some(0), Some(issued), Some(issued + 9 * YEAR)] {
        let client = client_config(&trust, None, known).unwrap();
        handshake(client, old.clone(), SERVER_NAME).unwrap();
    }
    // Its end is known to be over.
    let client = client_config(&trust, None, Some(issued + 11 * YEAR)).unwrap();
    assert!(handshake(client, old, SERVER_NAME).is_err());
}

#[test]
fn clients_certificates_end_by_keyds_signed_time() {
    let authority = Authority::generate(NOW).unwrap();
    let identity = client_of(&authority);
    let trust = Trust::Ca(authority.certificate().clone());
    let clocks: [(fn() -> u64, bool); 4] = [
        (|| 6 * YEAR, true),
        (|| NOW, true),
        (|| NOW + 9 * YEAR, true),
        (|| NOW + 11 * YEAR, false),
    ];
    for (clock, good) in clocks {
        let (chain, key) = authority.issue_server(NOW).unwrap();
        let server = server_config(authority.certificate(), chain, key, clock).unwrap();
        let client = client_config(&trust, Some(&identity), None).unwrap();
        assert_eq!(
            handshake(client, server, SERVER_NAME).is_ok(),
            good,
            "{}",
            clock()
        );
    }
}

#[test]
fn strangers_are_refused_on_both_sides() {
    let authority = Authority::generate(NOW).unwrap();
    let stranger = Authority::generate(NOW).unwrap();
    for trust in [
        Trust::Ca(stranger.certificate().clone()),
        Trust::Pinned(stranger.sha256()),
    ] {
        let client = client_config(&trust, None, None).unwrap();
        assert!(handshake(client, server(&authority), SERVER_NAME).is_err());
    }
    let trust = Trust::Ca(authority.certificate().clone());
    let client = client_config(&trust, Some(&client_of(&stranger)), None).unwrap();
    assert!(handshake(client, server(&authority), SERVER_NAME).is_err());
    let client = client_config(&trust, None, None).unwrap();
    assert!(handshake(client, server(&authority), "other.warren.internal").is_err());
}

#[test]
fn an_agents_certificate_is_no_server_certificate() {
    let authority = Authority::generate(NOW).unwrap();
    let identity = client_of(&authority);
    let chain = vec![
        identity.certificate_der.clone().into(),
        authority.certificate().clone(),
    ];
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(identity.key_der.to_vec()).into();
    let imposter = server_config(authority.certificate(), chain, key, || NOW).unwrap();
    for trust in [
        Trust::Ca(authority.certificate().clone()),
        Trust::Pinned(authority.sha256()),
    ] {
        let client = client_config(&trust, None, None).unwrap();
        assert!(handshake(client, imposter.clone(), SERVER_NAME).is_err());
    }
}

#[test]
fn authorities_survive_pem_and_foreign_keys_are_noticed() {
    let authority = Authority::generate(NOW).unwrap();
    let back = Authority::from_pem(&authority.certificate_pem(), authority.expose_key_pem()).unwrap();
    assert_eq!(back.sha256(), authority.sha256());
    let client = client_config(
        &Trust::from_pem(&authority.certificate_pem()).unwrap(),
        None,
        None,
    )
    .unwrap();
    handshake(client, server(&back), SERVER_NAME).unwrap();
    let other = Authority::generate(NOW).unwrap();
    assert!(Authority::from_pem(&authority.certificate_pem(), other.expose_key_pem()).is_err());
    assert!(Authority::from_pem("junk", authority.expose_key_pem()).is_err());
}

#[test]
fn requests_choose_nothing_but_their_key() {
    let authority = Authority::generate(NOW).unwrap();
    assert!(
        authority
            .issue_client(b"junk", &"node1".into(), &"uid1".into(), NOW)
            .is_err()
    );
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([SERVER_NAME.to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "node2");
    let csr = params.serialize_request(&key).unwrap();
    let (certificate, _) = authority
        .issue_client(csr.der(), &"node1".into(), &"uid1".into(), NOW)
        .unwrap();
    assert_eq!(certified_node(&certificate).unwrap().name.as_str(), "node1");
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
    assert!(!parsed.is_ca());
    assert!(parsed.subject_alternative_name().unwrap().is_none());
}
