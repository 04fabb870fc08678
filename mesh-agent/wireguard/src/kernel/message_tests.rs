use netlink_packet_core::{Nla, ParseableParametrized as _};
use netlink_packet_generic::GenlHeader;
use netlink_packet_wireguard::{WireguardCmd, WireguardMessage, WireguardTimeSpec};
use warren_model::{PreSharedKey, PrivateKey};

use super::*;
use crate::{memory_search::occurrences, wipe_stack};

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32]).unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Through bytes and back, as the kernel would read it.
fn reparse(attributes: Vec<WireguardAttribute>) -> Vec<WireguardAttribute> {
    let message = WireguardMessage {
        cmd: WireguardCmd::SetDevice,
        attributes,
    };
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    WireguardMessage::parse_with_param(&bytes, GenlHeader { cmd: 1, version: 1 })
        .unwrap()
        .attributes
}

fn peers(step: &Step) -> Vec<Vec<WireguardPeerAttribute>> {
    let Step::Set(Attributes(attributes)) = step else {
        panic!("not a message: {step:?}")
    };
    assert_eq!(reparse(attributes.clone()), *attributes);
    attributes
        .iter()
        .find_map(|attribute| match attribute {
            WireguardAttribute::Peers(peers) => Some(peers.iter().map(|peer| peer.0.clone()).collect()),
            _ => None,
        })
        .unwrap_or_default()
}

fn flags(attributes: &[WireguardPeerAttribute]) -> Option<WireguardPeerFlags> {
    attributes.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::Flags(flags) => Some(*flags),
        _ => None,
    })
}

#[test]
fn device_settings_replace_nothing() {
    let change = DeviceChange::SetDevice {
        private_key: PrivateKey::from_bytes([7; 32]),
        listen_port: 51871,
    };
    let steps = plan("warren0", &[change], true);
    let Step::Set(Attributes(attributes)) = &steps[0] else {
        panic!()
    };
    assert_eq!(steps.len(), 1);
    assert!(attributes.contains(&WireguardAttribute::IfName("warren0".into())));
    assert!(attributes.contains(&WireguardAttribute::ListenPort(51871)));
    assert!(
        !attributes
            .iter()
            .any(|attribute| matches!(attribute, WireguardAttribute::Flags(_)))
    );
}

#[test]
fn prefixes_are_added_without_replacing_and_joined_per_peer() {
    let add = |n, prefix| DeviceChange::AddAllowedIp {
        public_key: key(n),
        prefix: net(prefix),
    };
    let steps = plan(
        "warren0",
        &[add(1, "10.1.0.7/16"), add(1, "fd00::/64"), add(2, "10.2.0.0/16")],
        true,
    );
    let peers = peers(&steps[0]);
    assert_eq!((steps.len(), peers.len()), (1, 2));
    for peer in &peers {
        assert_eq!(flags(peer), Some(WireguardPeerFlags::UpdateOnly));
    }
    let expected = [
        allowed_ip(net("10.1.0.0/16"), false),
        allowed_ip(net("fd00::/64"), false),
    ];
    assert!(peers[0].contains(&WireguardPeerAttribute::AllowedIps(expected.to_vec())));
}

#[test]
fn a_prefix_is_taken_away_by_flag_or_by_a_throw_away_peer() {
    let change = [DeviceChange::RemoveAllowedIp {
        public_key: key(1),
        prefix: net("10.1.2.3/16"),
    }];
    let flagged = peers(&plan("warren0", &change, true)[0]);
    let removed = WireguardPeerAttribute::AllowedIps(vec![allowed_ip(net("10.1.0.0/16"), true)]);
    assert!(flagged[0].contains(&removed));
    assert_eq!(flags(&flagged[0]), Some(WireguardPeerFlags::UpdateOnly));

    let step = &plan("warren0", &change, false)[0];
    assert_eq!(
        *step,
        Step::TakeAway {
            public_key: key(1),
            prefix: net("10.1.0.0/16")
        }
    );
    let moved = peers(&Step::Set(discard("warren0", key(9), net("10.1.0.0/16"))));
    assert_eq!(moved[0][0], WireguardPeerAttribute::PublicKey(*key(9).as_bytes()));
    assert_eq!(flags(&moved[0]), None);
    assert_eq!(moved[1], with_flags(&key(9), WireguardPeerFlags::RemoveMe).0);
}

#[test]
fn order_is_kept_around_device_changes() {
    let peer = |n| DeviceChange::SetPeer {
        public_key: key(n),
        pre_shared_key: None,
        endpoint: None,
        keepalive_seconds: 25,
    };
    let steps = plan(
        "warren0",
        &[
            peer(1),
            DeviceChange::Clear,
            peer(2),
            DeviceChange::RemovePeer(key(2)),
        ],
        true,
    );
    assert_eq!(steps.len(), 3);
    assert_eq!(peers(&steps[0]).len(), 1);
    assert_eq!(peers(&steps[1]).len(), 0);
    assert_eq!(flags(&peers(&steps[2])[1]), Some(WireguardPeerFlags::RemoveMe));
}

#[test]
fn a_peer_that_gets_another_pre_shared_key_is_removed_first() {
    let changes = [
        DeviceChange::RemovePeer(key(1)),
        DeviceChange::SetPeer {
            public_key: key(1),
            pre_shared_key: PreSharedKey::from_bytes(&[7; 32]),
            endpoint: None,
            keepalive_seconds: 1,
        },
    ];
    let steps = plan("warren0", &changes, true);
    let peers = peers(&steps[0]);
    assert_eq!((steps.len(), peers.len()), (1, 2));
    assert_eq!(flags(&peers[0]), Some(WireguardPeerFlags::RemoveMe));
    assert!(peers[1].contains(&WireguardPeerAttribute::PresharedKey([7; 32])));
}

#[test]
fn large_changes_are_cut_into_messages_that_fit() {
    let changes: Vec<_> = (0..5000u32)
        .map(|n| DeviceChange::AddAllowedIp {
            public_key: key(1 + (n / 2500) as u8),
            prefix: IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + n * 256).into(), 24).unwrap(),
        })
        .collect();
    let steps = plan("warren0", &changes, true);
    let mut count = 0;
    for step in &steps {
        for peer in peers(step) {
            assert!(WireguardPeer(peer.clone()).value_len() <= PEERS_LIMIT);
            for attribute in peer {
                if let WireguardPeerAttribute::AllowedIps(prefixes) = attribute {
                    count += prefixes.len();
                }
            }
        }
    }
    assert_eq!(count, 5000);
    assert!(steps.len() > 5);
}

#[test]
fn a_dump_is_merged_over_its_messages() {
    let first = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*key(2).as_bytes()),
        WireguardPeerAttribute::Endpoint("192.0.2.1:51871".parse().unwrap()),
        WireguardPeerAttribute::LastHandshake(WireguardTimeSpec {
            seconds: 1_700_000_000,
            nano_seconds: 5,
        }),
        WireguardPeerAttribute::RxBytes(11),
        WireguardPeerAttribute::PresharedKey([7; 32]),
        WireguardPeerAttribute::TxBytes(12),
        WireguardPeerAttribute::AllowedIps(vec![allowed_ip(net("10.2.0.0/16"), false)]),
    ]);
    let next = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*key(2).as_bytes()),
        WireguardPeerAttribute::AllowedIps(vec![allowed_ip(net("10.1.0.0/16"), false)]),
    ]);
    let other = WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*key(1).as_bytes()),
        WireguardPeerAttribute::PresharedKey([0; 32]),
        WireguardPeerAttribute::LastHandshake(WireguardTimeSpec::default()),
    ]);
    let (_, attributes) = redacted(vec![
        WireguardAttribute::PublicKey(*key(7).as_bytes()),
        WireguardAttribute::ListenPort(51871),
        WireguardAttribute::Peers(vec![first]),
        WireguardAttribute::Peers(vec![next, other]),
    ]);
    let state = state(attributes.into_iter()).unwrap();
    assert_eq!((state.public_key, state.listen_port), (Some(key(7)), 51871));
    assert_eq!(
        state.peers.iter().map(|peer| peer.public_key).collect::<Vec<_>>(),
        [key(1), key(2)]
    );
    assert_eq!(state.peers[0].last_handshake, None);
    let psks: Vec<_> = state.peers.iter().map(|peer| peer.pre_shared_key).collect();
    assert_eq!(psks, [None, Some(crate::psk_id(&[7; 32]))]);
    assert_eq!(
        state.peers[1].allowed_ips,
        [net("10.1.0.0/16"), net("10.2.0.0/16")]
    );
    assert_eq!(
        state.peers[1].last_handshake,
        Some(UNIX_EPOCH + Duration::new(1_700_000_000, 5))
    );
    assert_eq!(
        (state.peers[1].received_bytes, state.peers[1].sent_bytes),
        (11, 12)
    );
}

#[test]
fn an_all_zero_device_key_is_no_key() {
    let state = state([WireguardAttribute::PublicKey([0; 32])].into_iter()).unwrap();
    assert_eq!(state.public_key, None);
}

/// As the kernel sends them, redacted, and read.
fn redacted(attributes: Vec<WireguardAttribute>) -> (Vec<u8>, Vec<WireguardAttribute>) {
    let message = WireguardMessage {
        cmd: WireguardCmd::GetDevice,
        attributes,
    };
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    redact(&mut bytes);
    let read = WireguardMessage::parse_with_param(&bytes, GenlHeader { cmd: 0, version: 1 });
    (bytes, read.unwrap().attributes)
}

#[test]
fn what_the_kernel_tells_loses_its_keys_before_it_is_read() {
    let peer = |n, key: [u8; 32]| {
        WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey([n; 32]),
            WireguardPeerAttribute::PresharedKey(key),
            WireguardPeerAttribute::PersistentKeepalive(25),
        ])
    };
    let (bytes, attributes) = redacted(vec![
        WireguardAttribute::IfName("warren0".into()),
        WireguardAttribute::PrivateKey([9; 32]),
        WireguardAttribute::PublicKey(*key(7).as_bytes()),
        WireguardAttribute::Peers(vec![peer(1, [5; 32]), peer(2, [0; 32])]),
        WireguardAttribute::Peers(vec![peer(3, [6; 32])]),
    ]);
    for secret in [5, 6, 9] {
        assert!(!bytes.windows(4).any(|window| window == [secret; 4]), "{secret}");
    }
    let state = state(attributes.into_iter()).unwrap();
    assert_eq!(state.public_key, Some(key(7)));
    let keys = state
        .peers
        .iter()
        .map(|peer| (peer.pre_shared_key, peer.keepalive_seconds));
    let expected = [Some([5; 32]), None, Some([6; 32])].map(|key| (key.map(|key| crate::psk_id(&key)), 25));
    assert_eq!(keys.collect::<Vec<_>>(), expected);
}

#[test]
fn malformed_attributes_are_left_to_the_parser() {
    for bytes in [
        &[][..],
        &[4],
        &[3, 0, 3, 0],
        &[255, 255, 3, 0, 1, 2],
        &[6, 0, 8, 0, 9, 9],
        &[9, 0, 3, 0, 1, 1, 1, 1, 1],
        &[8, 0, 8, 128, 255, 255, 0, 0],
    ] {
        redact(&mut bytes.to_vec());
    }
}

/// A device and 32 peers, all with the key whose complement this is. Not inlined: the key is on this function's stack.
#[inline(never)]
fn with_keys(complement: &[u8; 32]) -> Vec<DeviceChange> {
    let secret = complement.map(|byte| !byte);
    let device = DeviceChange::SetDevice {
        private_key: PrivateKey::from_bytes(secret),
        listen_port: 51871,
    };
    let peers = (1..33).map(|n| DeviceChange::SetPeer {
        public_key: key(n),
        pre_shared_key: PreSharedKey::from_bytes(&secret),
        endpoint: Some(([192, 0, 2, n], 51871).into()),
        keepalive_seconds: 25,
    });
    std::iter::once(device).chain(peers).collect()
}

/// The requests, as bytes.
#[inline(never)]
fn written(changes: &[DeviceChange]) -> Vec<Zeroizing<Vec<u8>>> {
    let steps = plan("warren0", changes, true).into_iter();
    let requests = steps.map(|step| match step {
        Step::Set(attributes) => request(28, 0, 1, WireguardCmd::SetDevice, attributes),
        Step::TakeAway { .. } => panic!("not a message"),
    });
    requests.collect()
}

#[test]
fn requests_leave_no_keys_behind() {
    let mut complement = [0; 32];
    getrandom::fill(&mut complement).unwrap();
    for round in 0..8 {
        let requests = written(&with_keys(&complement));
        wipe_stack();
        let held = occurrences(&complement);
        assert_eq!(held, 33, "round {round}: each once, in the requests");
        drop(requests);
        wipe_stack();
        assert_eq!(occurrences(&complement), 0, "round {round}");
    }
}
