use proptest::prelude::*;
use warren_model::PreSharedKey;

use super::*;

const KEY: &str = "1c8828f713732c49162c04924e24ea232c9b674537c062e55227d48f29fcf293";

fn set(lines: &str) -> Result<SetRequest, Malformed> {
    match parse_request(&format!("set=1\n{lines}"))? {
        Request::Set(request) => Ok(*request),
        Request::Get => panic!("a get"),
    }
}

#[test]
fn a_whole_request() {
    let request = set(&format!(
        "private_key={KEY}\nlisten_port=51871\nfwmark=4096\nreplace_peers=true\n\
         public_key={KEY}\nupdate_only=true\npreshared_key={KEY}\nendpoint=[2001:db8::1]:51871\n\
         persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.1.2.3/16\n\
         allowed_ip=-fd00::1/64\nprotocol_version=1\n\
         public_key={KEY}\nremove=true\n"
    ))
    .unwrap();
    assert_eq!(
        (request.listen_port, request.fwmark, request.replace_peers),
        (Some(51871), Some(4096), true)
    );
    assert!(matches!(request.private_key, Some(Some(_))));
    let [peer, removed] = &request.peers[..] else {
        panic!("two peers")
    };
    assert!(peer.update_only && peer.replace_allowed_ips && !peer.remove);
    assert_eq!(peer.endpoint, Some("[2001:db8::1]:51871".parse().unwrap()));
    assert_eq!(peer.keepalive_seconds, Some(25));
    assert!(matches!(peer.preshared_key, Some(Some(_))));
    let expected = [
        AllowedIpChange::Add("10.1.0.0/16".parse().unwrap()),
        AllowedIpChange::Remove("fd00::/64".parse().unwrap()),
    ];
    assert_eq!(peer.allowed_ips, expected);
    assert!(removed.remove);
}

#[test]
fn zero_keys_take_keys_away() {
    let zero = "0".repeat(64);
    let request = set(&format!(
        "private_key={zero}\npublic_key={KEY}\npreshared_key={zero}\n"
    ))
    .unwrap();
    assert!(matches!(request.private_key, Some(None)));
    assert!(matches!(request.peers[0].preshared_key, Some(None)));
}

#[test]
fn what_is_no_request_is_refused_with_its_line() {
    let peer = format!("public_key={KEY}\n");
    for bad in [
        "nonsense\n",
        "unknown=1\n",
        "private_key=12\n",
        &format!("private_key={KEY}00\n"),
        "listen_port=65536\n",
        "listen_port=-1\n",
        "listen_port=+1\n",
        "fwmark=4294967296\n",
        "replace_peers=false\n",
        "allowed_ip=10.0.0.0/8\n",
        &format!("public_key={}\n", "0".repeat(64)),
        &format!("public_key=01{}\n", "0".repeat(62)),
        &format!("{peer}endpoint=192.0.2.1\n"),
        &format!("{peer}endpoint=192.0.2.1:0\n"),
        &format!("{peer}endpoint=example.org:51871\n"),
        &format!("{peer}endpoint=[fe80::1%no-such-link]:51871\n"),
        &format!("{peer}allowed_ip=10.0.0.0\n"),
        &format!("{peer}allowed_ip=10.0.0.0/33\n"),
        &format!("{peer}allowed_ip=--10.0.0.0/8\n"),
        &format!("{peer}persistent_keepalive_interval=65536\n"),
        &format!("{peer}protocol_version=2\n"),
        &format!("{peer}remove=1\n"),
        &format!("{peer}listen_port=1\n"),
        "=\n",
        "\u{1F980}=1\n",
    ] {
        let error = set(bad).err().unwrap_or_else(|| panic!("accepted: {bad}"));
        assert_eq!(error.line, 1 + bad.lines().count(), "{bad}");
        assert!(!error.to_string().contains(&KEY[..8]), "the text may be a key");
    }
    for bad in ["", "get=2", "get=1\nset=1", "set=0", "hello"] {
        assert!(parse_request(bad).is_err(), "{bad}");
    }
}

#[test]
fn scoped_addresses_by_number_and_by_name() {
    let peer = format!("public_key={KEY}\n");
    for zone in ["1", "lo"] {
        let request = set(&format!("{peer}endpoint=[fe80::1%{zone}]:51871\n")).unwrap();
        let Some(SocketAddr::V6(endpoint)) = request.peers[0].endpoint else {
            panic!("{zone}")
        };
        assert_eq!((endpoint.scope_id(), endpoint.port()), (1, 51871));
    }
}

#[test]
fn changes_become_requests_that_do_not_replace() {
    let key = |n| PublicKey::from_bytes([n; 32]).unwrap();
    let prefix = "10.1.0.0/16".parse().unwrap();
    let changes = [
        DeviceChange::SetPeer {
            public_key: key(1),
            pre_shared_key: None,
            endpoint: None,
            keepalive_seconds: 25,
        },
        DeviceChange::SetDevice {
            private_key: PrivateKey::from_bytes([9; 32]),
            listen_port: 51871,
        },
        DeviceChange::AddAllowedIp {
            public_key: key(1),
            prefix,
        },
        DeviceChange::RemoveAllowedIp {
            public_key: key(1),
            prefix,
        },
        DeviceChange::RemovePeer(key(2)),
        DeviceChange::SetPeer {
            public_key: key(2),
            pre_shared_key: PreSharedKey::from_bytes(&[7; 32]),
            endpoint: None,
            keepalive_seconds: 1,
        },
        DeviceChange::Clear,
    ];
    let requests = format_changes(&changes, 4096);
    assert_eq!(
        requests.len(),
        4,
        "device lines come alone: what follows must not fail with them"
    );
    for request in &requests {
        let text = request.strip_suffix("\n\n").expect("an empty line at the end");
        assert!(parse_request(text).is_ok(), "{text}");
        assert!(!text.contains("replace_allowed_ips"));
        assert_eq!(text.contains("replace_peers"), *request == requests[3]);
    }
    assert!(requests[2].contains("allowed_ip=-10.1.0.0/16\n"));
    // A peer that gets another pre-shared key is removed first, in the same request: its sessions end.
    let anew = format!(
        "{}\nremove=true\npublic_key={}\npreshared_key=",
        "02".repeat(32),
        "02".repeat(32)
    );
    assert!(requests[2].contains(&anew));
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}", lines in prop::collection::vec("[a-z_]{0,12}=[-0-9a-f:./\\[\\]%]{0,70}", 0..8)) {
        let _ = parse_request(&text);
        let _ = parse_view(&text);
        let text = format!("set=1\npublic_key={KEY}\n{}", lines.join("\n"));
        let _ = parse_request(&text);
        let _ = parse_view(&lines.join("\n"));
    }

    #[test]
    fn what_a_device_has_comes_back(
        port in any::<u16>(),
        peers in prop::collection::btree_map(2u8..250, (any::<(u32, u16, u64, u64)>(), any::<u16>(), 0u8..=32), 0..5),
    ) {
        let key = |n: u8| PublicKey::from_bytes([n; 32]).unwrap();
        let peers: Vec<_> = peers.into_iter().map(|(n, ((seconds, keepalive, received, sent), place, length))| PeerState {
            public_key: key(n),
            pre_shared_key: (n % 2 == 0).then(|| crate::psk_id(&[n; 32])),
            endpoint: (place != 0).then(|| ([192, 0, 2, n], place).into()),
            keepalive_seconds: keepalive,
            allowed_ips: vec![IpNet::new([10, n, 0, 1].into(), length).unwrap().trunc()],
            last_handshake: (seconds != 0).then(|| UNIX_EPOCH + Duration::new(seconds.into(), 7)),
            received_bytes: received,
            sent_bytes: sent,
        }).collect();
        let view = DeviceView {
            private_key: None,
            listen_port: port,
            fwmark: 1,
            peers: peers
                .iter()
                .map(|peer| {
                    let secret = PreSharedKey::from_bytes(&[peer.public_key.as_bytes()[0]; 32]);
                    (peer.clone(), secret.filter(|_| peer.pre_shared_key.is_some()))
                })
                .collect(),
        };
        let state = parse_view(&format_view(&view)).unwrap();
        prop_assert_eq!(state, DeviceState { public_key: None, listen_port: port, peers });
    }
}
