//! Hostile and odd packets under a policy, through the loaded programs. The pod may open TCP to port 80 of the peer, and
//! the peer TCP to port 80 of the pod; nothing else.

use warren_abi::FlowState;

use super::{
    POD_INDEX, POD_MAC, config,
    frames::{ACK, FIN, PASS, RST, SYN, ethernet, fragment, framed, packet, tcp, unreachable, v4, v6, vlan},
    isolation::isolated,
    pod, set_owners,
    verdicts::judge,
};
use crate::{
    Datapath, PolicyDirection, PolicyEndpoint, PolicyPeerKind, PolicyPort, PolicyPortKey, PolicyVerdict,
    PolicyVerdictKey, testing::TestPacket,
};

/// Loopback stands for the pod's veth.
const DEVICE: u32 = 1;
const TUNNEL_MARK: u32 = 0x2000;
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The pod, and a peer on another node, in both families.
const ENDS: [(&str, &str); 2] = [
    ("10.244.1.2", "10.244.2.9"),
    ("fd00:10:244:1::2", "fd00:10:244:2::9"),
];
const TCP: u8 = 6;
const UDP: u8 = 17;
const PEER: u32 = 300;

type Answer = Result<(i32, u32), String>;

struct Scene {
    datapath: Datapath,
}

impl Scene {
    fn new(pins: &std::path::Path) -> Self {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        set_owners(&mut datapath);
        for direction in [PolicyDirection::Ingress, PolicyDirection::Egress] {
            let mut port = |bits, length, class| {
                let key = PolicyPortKey {
                    policy: 1,
                    direction,
                    bits,
                    length,
                };
                let value = PolicyPort {
                    class,
                    has_cidrs: false,
                };
                datapath.set_policy_port(key, value).unwrap();
            };
            port(0, 0, 1);
            port(u32::from(TCP) << 16 | 80, 24, 2);
        }
        let allowed = PolicyVerdictKey {
            class: 2,
            kind: PolicyPeerKind::Identity,
            id: PEER,
        };
        let verdict = PolicyVerdict { allow: true, rule: 7 };
        datapath.set_policy_verdict(allowed, verdict).unwrap();
        for (index, open) in [(POD_INDEX, false), (0, true)] {
            let policy = PolicyEndpoint {
                policy: 1,
                cidr_table: 1,
                audit: false,
                ingress_open: open,
                egress_open: open,
            };
            datapath.set_policy_endpoint(index, policy).unwrap();
        }
        let state = datapath.maps.flows.state.get().unwrap();
        // Connections that are older than the maps are another matter.
        let state = FlowState {
            adopt_until: 0,
            ..state
        };
        datapath.maps.flows.state.set(state).unwrap();
        Self { datapath }
    }

    /// The pod sends.
    fn out(&mut self, packet: &[u8]) -> Answer {
        judge(&mut self.datapath, "from_pod", &framed(POD_MAC, packet), 0)
    }

    /// The pod is sent, from the tunnel.
    fn into(&mut self, packet: &[u8]) -> Answer {
        judge(
            &mut self.datapath,
            "to_pod",
            &framed(OTHER_MAC, packet),
            TUNNEL_MARK,
        )
    }

    /// The kernel takes such a frame.
    fn runs(&self, program: &str, frame: &[u8]) -> bool {
        let packet = TestPacket {
            frame,
            ifindex: DEVICE,
            ingress_ifindex: 0,
            mark: 0,
            repeat: 1,
        };
        self.datapath.test_run(program, &packet).is_ok()
    }

    fn flows(&self) -> usize {
        self.datapath.flows(None, usize::MAX).unwrap().len()
    }

    fn forget(&mut self) {
        self.datapath.clear_flows().unwrap();
    }
}

/// Both families, each with fresh maps.
fn both(test: fn(&mut Scene, &str, &str)) {
    for (own, peer) in ENDS {
        isolated(move |pins| test(&mut Scene::new(pins), own, peer));
    }
}

fn denied() -> Answer {
    Err("default-deny".into())
}

fn reason(reason: &str) -> Answer {
    Err(reason.into())
}

/// Which bits of the mark do not matter here.
fn passes(answer: &Answer) -> bool {
    matches!(answer, Ok((PASS, _)))
}

#[test]
fn the_policy_of_these_tests() {
    both(|scene, own, peer| {
        assert!(passes(&scene.out(&packet(own, peer, TCP, &tcp(4_000, 80, SYN)))));
        assert_eq!(scene.out(&packet(own, peer, TCP, &tcp(4_000, 81, SYN))), denied());
        assert!(passes(&scene.into(&packet(peer, own, TCP, &tcp(4_001, 80, SYN)))));
        assert_eq!(
            scene.into(&packet(peer, own, TCP, &tcp(4_001, 81, SYN))),
            denied()
        );
        assert_eq!(scene.flows(), 2);
    });
}

#[test]
fn every_truncation_is_dropped() {
    both(|scene, own, peer| {
        for (program, mark, mac, from, to) in [
            ("from_pod", 0, POD_MAC, own, peer),
            ("to_pod", TUNNEL_MARK, OTHER_MAC, peer, own),
        ] {
            let whole = framed(mac, &packet(from, to, TCP, &tcp(4_000, 80, SYN)));
            let mut judged = 0;
            for length in 15..whole.len() {
                // The kernel runs no program on a frame that ends within the fixed header.
                if scene.runs(program, &whole[..length]) {
                    let answer = judge(&mut scene.datapath, program, &whole[..length], mark);
                    assert_eq!(answer, reason("truncated"), "{program}, {length} bytes");
                    judged += 1;
                }
            }
            assert!(judged >= 19, "every length of the transport header: {judged}");
        }
        // The IP header says that it is whole, and the transport header is not.
        for (protocol, header) in [(TCP, 20), (UDP, 8), (132, 12), (1, 8), (58, 8)] {
            let short = packet(own, peer, protocol, &vec![0; header - 1]);
            let answer = scene.out(&short);
            assert!(answer.is_err(), "{protocol}: {answer:?}");
            assert_ne!(answer, denied(), "{protocol}");
        }
        assert_eq!(scene.flows(), 0);
    });
}

#[test]
fn malformed_headers() {
    isolated(|pins| {
        let mut scene = Scene::new(pins);
        let good = v4("10.244.1.2", "10.244.2.9", TCP, 0, &tcp(4_000, 80, SYN));
        let mut broken = |offset: usize, value: u8| {
            let mut packet = good.clone();
            packet[offset] = value;
            judge(
                &mut scene.datapath,
                "from_pod",
                &ethernet(POD_MAC, 0x0800, &packet),
                0,
            )
        };
        assert_eq!(broken(0, 0x44), reason("malformed"), "a header of 16 bytes");
        assert_eq!(broken(0, 0x65), reason("malformed"), "version 6 in an IPv4 frame");
        assert_eq!(
            broken(0, 0x4f),
            reason("malformed"),
            "a header longer than the packet"
        );
        assert_eq!(broken(3, 19), reason("malformed"), "shorter than its header");
        assert_eq!(broken(2, 0xff), reason("truncated"), "longer than the frame");
        assert_eq!(broken(32, 0x40), reason("malformed"), "a TCP header of 16 bytes");
        let mut six = v6(
            "fd00:10:244:1::2",
            "fd00:10:244:2::9",
            TCP,
            64,
            &tcp(4_000, 80, SYN),
        );
        six[0] = 0x40;
        assert_eq!(
            judge(
                &mut scene.datapath,
                "from_pod",
                &ethernet(POD_MAC, 0x86dd, &six),
                0
            ),
            reason("malformed")
        );
    });
}

#[test]
fn padding_of_the_link_is_no_payload() {
    isolated(|pins| {
        let mut scene = Scene::new(pins);
        // What would be the ports lies behind the packet's end.
        let mut packet = v4("10.244.1.2", "10.244.2.9", TCP, 0, &[]);
        packet.extend(tcp(4_000, 80, SYN));
        assert_eq!(scene.out(&packet), reason("truncated"));
    });
}

#[test]
fn extension_headers_hide_no_port() {
    isolated(|pins| {
        let mut scene = Scene::new(pins);
        let chain = |kinds: &[u8], port| {
            let mut payload = tcp(4_000, port, SYN);
            let mut next = TCP;
            for kind in kinds.iter().rev() {
                payload = [&[next, 0, 0, 0, 0, 0, 0, 0], &payload[..]].concat();
                next = *kind;
            }
            v6("fd00:10:244:1::2", "fd00:10:244:2::9", next, 64, &payload)
        };
        let kinds = [0, 60, 43, 135, 139, 140, 44, 60];
        for rotation in 0..kinds.len() {
            for count in 0..=kinds.len() {
                let chosen: Vec<u8> = kinds.iter().cycle().skip(rotation).take(count).copied().collect();
                assert!(passes(&scene.out(&chain(&chosen, 80))), "{chosen:?}");
                assert_eq!(scene.out(&chain(&chosen, 81)), denied(), "{chosen:?}");
            }
        }
        assert_eq!(scene.out(&chain(&[60; 9], 80)), reason("extension-headers"));
        // No next header: nothing for policy to allow.
        assert_eq!(scene.out(&chain(&[59], 80)), denied());
    });
}

/// The parts of a TCP packet: from `offset` (in units of eight bytes) on.
fn part(own: &str, peer: &str, id: u32, offset: u16, more: bool, bytes: &[u8]) -> Vec<u8> {
    if own.contains(':') {
        return v6(own, peer, 44, 64, &fragment(TCP, offset, more, id, bytes));
    }
    let mut packet = v4(own, peer, TCP, u16::from(more) << 13 | offset, bytes);
    packet[4..6].copy_from_slice(&(id as u16).to_be_bytes());
    packet
}

#[test]
fn fragments_follow_their_first() {
    both(|scene, own, peer| {
        let first = |port| [tcp(4_000, port, SYN), vec![7; 4]].concat();
        let later = [9; 16];
        assert_eq!(
            scene.out(&part(own, peer, 1, 3, false, &later)),
            reason("unknown-fragment"),
            "without the first, or before it"
        );
        assert!(passes(&scene.out(&part(own, peer, 1, 0, true, &first(80)))));
        assert!(passes(&scene.out(&part(own, peer, 1, 3, true, &later))));
        assert!(
            passes(&scene.out(&part(own, peer, 1, 5, false, &later))),
            "in any order"
        );
        assert!(passes(&scene.out(&part(own, peer, 1, 3, false, &later))));
        assert_eq!(
            scene.out(&part(own, peer, 2, 3, false, &later)),
            reason("unknown-fragment"),
            "of another datagram"
        );
        assert_eq!(scene.out(&part(own, peer, 3, 0, true, &first(81))), denied());
        assert_eq!(
            scene.out(&part(own, peer, 3, 3, false, &later)),
            denied(),
            "of a datagram that is denied"
        );
        // The same towards the pod.
        assert_eq!(
            scene.into(&part(peer, own, 4, 3, false, &later)),
            reason("unknown-fragment")
        );
        assert!(passes(&scene.into(&part(peer, own, 4, 0, true, &first(80)))));
        assert!(passes(&scene.into(&part(peer, own, 4, 3, false, &later))));
    });
}

#[test]
fn fragments_cannot_hide_a_header() {
    both(|scene, own, peer| {
        let header = tcp(4_000, 80, SYN);
        assert_eq!(
            scene.out(&part(own, peer, 1, 0, true, &header[..8])),
            reason("tiny-fragment"),
            "ports, but no flags"
        );
        assert!(passes(&scene.out(&part(
            own,
            peer,
            2,
            0,
            true,
            &[header, vec![0; 4]].concat()
        ))));
        for offset in [1, 2] {
            assert_eq!(
                scene.out(&part(own, peer, 2, offset, false, &[0; 16])),
                reason("overlapping-fragment"),
                "offset {offset} would change flags or ports"
            );
        }
    });
}

#[test]
fn tags_and_foreign_frames() {
    both(|scene, own, peer| {
        let frame = framed(POD_MAC, &packet(own, peer, TCP, &tcp(4_000, 80, SYN)));
        for (program, mark) in [("from_pod", 0), ("to_pod", TUNNEL_MARK)] {
            for tagged in [vlan(0x8100, &frame), vlan(0x88a8, &vlan(0x8100, &frame))] {
                assert_eq!(
                    judge(&mut scene.datapath, program, &tagged, mark),
                    reason("bad-ethertype")
                );
            }
        }
        let foreign = framed(OTHER_MAC, &packet(own, peer, TCP, &tcp(4_000, 80, SYN)));
        assert_eq!(
            judge(&mut scene.datapath, "from_pod", &foreign, 0),
            reason("spoofed-mac")
        );
        let spoofed = packet(peer, own, TCP, &tcp(4_000, 80, SYN));
        assert_eq!(scene.out(&spoofed), reason("spoofed-address"));
        let clear = framed(OTHER_MAC, &packet(peer, own, TCP, &tcp(4_000, 80, SYN)));
        assert_eq!(
            judge(&mut scene.datapath, "to_pod", &clear, 0),
            reason("not-from-tunnel")
        );
        assert_eq!(scene.flows(), 0);
    });
}

#[test]
fn errors_need_a_flow_that_they_are_about() {
    both(|scene, own, peer| {
        let sent = packet(own, peer, TCP, &tcp(4_000, 80, SYN));
        let error = |source: &str, destination: &str, quoted: &[u8]| {
            let (protocol, body) = unreachable(quoted);
            packet(source, destination, protocol, &body)
        };
        assert_eq!(scene.into(&error(peer, own, &sent)), denied(), "nothing was sent");
        assert!(passes(&scene.out(&sent)));
        assert!(passes(&scene.into(&error(peer, own, &sent))));
        let header = sent.len() - 20;
        assert!(
            passes(&scene.into(&error(peer, own, &sent[..header + 8]))),
            "eight bytes of the header are all that must be quoted"
        );
        let forged = [
            ("another port", packet(own, peer, TCP, &tcp(4_000, 81, SYN))),
            (
                "another source port",
                packet(own, peer, TCP, &tcp(4_001, 80, SYN)),
            ),
            ("the other way", packet(peer, own, TCP, &tcp(80, 4_000, SYN))),
            ("another protocol", packet(own, peer, UDP, &tcp(4_000, 80, SYN))),
            ("cut off", sent[..header + 2].to_vec()),
            ("nothing", vec![sent[0]]),
        ];
        for (what, quoted) in forged {
            assert_eq!(scene.into(&error(peer, own, &quoted)), denied(), "{what}");
        }
        // A pod may report errors about what it was sent, and about nothing else.
        let received = packet(peer, own, TCP, &tcp(5_000, 80, SYN));
        assert_eq!(scene.out(&error(own, peer, &received)), denied());
        assert!(passes(&scene.into(&received)));
        assert!(passes(&scene.out(&error(own, peer, &received))));
        scene.forget();
        assert_eq!(scene.into(&error(peer, own, &sent)), denied(), "the flow is over");
    });
}

#[test]
fn only_a_syn_opens_a_connection() {
    both(|scene, own, peer| {
        for (what, flags) in [
            ("ACK", ACK),
            ("SYN-ACK", SYN | ACK),
            ("RST", RST),
            ("FIN", FIN | ACK),
            ("SYN-FIN", SYN | FIN),
            ("nothing", 0),
            ("everything", 0xff),
        ] {
            let port = 6_000 + u16::from(flags);
            drop(scene.out(&packet(own, peer, TCP, &tcp(port, 80, flags))));
            assert_eq!(scene.flows(), 0, "{what} opens nothing");
            assert_eq!(
                scene.into(&packet(peer, own, TCP, &tcp(80, port, ACK))),
                denied(),
                "so nothing answers a {what}"
            );
            assert_eq!(
                scene.out(&packet(own, peer, TCP, &tcp(port, 81, flags))),
                denied(),
                "{what}, to a port that is denied"
            );
        }
    });
}

#[test]
fn answers_pass_and_nothing_else() {
    both(|scene, own, peer| {
        assert!(passes(&scene.out(&packet(own, peer, TCP, &tcp(4_000, 80, SYN)))));
        let answer = |scene: &mut Scene, flags| scene.into(&packet(peer, own, TCP, &tcp(80, 4_000, flags)));
        assert_eq!(answer(scene, SYN), denied(), "a connection of the peer's own");
        assert!(passes(&answer(scene, SYN | ACK)));
        assert!(passes(&scene.out(&packet(own, peer, TCP, &tcp(4_000, 80, ACK)))));
        assert!(passes(&answer(scene, ACK)));
        for (source, destination) in [(80, 4_001), (81, 4_000)] {
            assert_eq!(
                scene.into(&packet(peer, own, TCP, &tcp(source, destination, ACK))),
                denied()
            );
        }
        assert_eq!(
            scene.into(&packet(peer, own, UDP, &tcp(80, 4_000, ACK))),
            denied(),
            "another protocol"
        );
        assert!(passes(&answer(scene, RST)));
        assert!(
            passes(&answer(scene, ACK)),
            "a reset may be forged: the stack decides"
        );
        assert_eq!(answer(scene, SYN), denied());
    });
}

#[test]
fn a_change_of_policy_ends_what_it_denies() {
    both(|scene, own, peer| {
        let out = packet(own, peer, TCP, &tcp(4_000, 80, ACK));
        let back = packet(peer, own, TCP, &tcp(80, 4_000, ACK));
        assert!(passes(&scene.out(&packet(own, peer, TCP, &tcp(4_000, 80, SYN)))));
        assert!(passes(&scene.into(&back)));
        let key = PolicyVerdictKey {
            class: 2,
            kind: PolicyPeerKind::Identity,
            id: PEER,
        };
        scene.datapath.raise_revision().unwrap();
        assert!(passes(&scene.into(&back)), "judged again, as it was opened");
        scene.datapath.remove_policy_verdict(key).unwrap();
        assert!(passes(&scene.into(&back)), "not before the revision is raised");
        scene.datapath.raise_revision().unwrap();
        assert_eq!(scene.into(&back), denied());
        assert_eq!(scene.out(&out), denied());
        scene
            .datapath
            .set_policy_verdict(key, PolicyVerdict { allow: true, rule: 8 })
            .unwrap();
        scene.datapath.raise_revision().unwrap();
        assert!(passes(&scene.out(&out)), "allowed again: it goes on");
        assert!(passes(&scene.into(&back)));
    });
}

#[test]
fn a_pod_without_policy_is_closed() {
    both(|scene, own, peer| {
        scene.datapath.remove_policy_endpoint(POD_INDEX).unwrap();
        let out = packet(own, peer, TCP, &tcp(4_000, 80, SYN));
        let into = packet(peer, own, TCP, &tcp(4_000, 80, SYN));
        assert_eq!(scene.out(&out), reason("no-policy"));
        assert_eq!(scene.into(&into), reason("no-policy"));
    });
}
