//! The loaded programs, one packet at a time (`BPF_PROG_TEST_RUN`). What is tested here is what the host cannot:
//! that the verifier takes them, that they find what the loader wrote, and what the kernel gets from them.

use super::{
    POD_MAC, config, dropped,
    frames::{DROP, PASS, REDIRECT, advertisement, arp, ethernet, run, udp, v6, vlan},
    ip,
    isolation::isolated,
    net, open_policies, pod, set_owners,
};
use crate::{Datapath, Endpoint, Path, PolicyEndpoint, Role};

/// Loopback stands for whatever device: a test run gives every packet an Ethernet header.
const DEVICE: u32 = 1;
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const TUNNEL_MARK: u32 = 0x2000;
const FOREIGN: u32 = 0xffff_c080;

/// Runs a frame; a drop must be counted under exactly its reason.
pub(crate) fn judge(
    datapath: &mut Datapath,
    program: &str,
    frame: &[u8],
    mark: u32,
) -> Result<(i32, u32), String> {
    let before = datapath.drops_by_hook().unwrap();
    let (answer, mark) = run(datapath, program, frame, DEVICE, mark);
    let mut changed = datapath.drops_by_hook().unwrap();
    changed.retain(|count| count.hook != "stack" && !before.contains(count));
    if answer != DROP {
        assert_eq!(changed, [], "a packet that passes is no drop");
        return Ok((answer, mark));
    }
    assert_eq!(changed.len(), 1, "one drop, one reason: {changed:?}");
    assert_eq!(changed[0].hook, program);
    Err(changed.remove(0).reason)
}

fn dropped_for(reason: &str) -> Result<(i32, u32), String> {
    Err(reason.to_owned())
}

#[test]
fn from_pod() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let mut out = |frame: &[u8]| judge(&mut datapath, "from_pod", frame, u32::MAX);
        let good = udp(POD_MAC, "10.244.1.2", "10.244.2.9");
        assert_eq!(out(&good), dropped_for("unknown-endpoint"));
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        open_policies(&mut datapath);
        let mut out = |frame: &[u8]| judge(&mut datapath, "from_pod", frame, u32::MAX);
        let judged = Ok((PASS, FOREIGN | TUNNEL_MARK | 5));
        assert_eq!(out(&good), judged);
        assert_eq!(out(&udp(POD_MAC, "fd00:10:244:1::2", "fd00:10:244:2::9")), judged);
        let marked = Ok((PASS, FOREIGN | 5));
        assert_eq!(
            out(&udp(POD_MAC, "10.244.1.2", "10.96.0.10")),
            marked,
            "a service: judged on its final address"
        );
        assert_eq!(out(&arp(POD_MAC, [10, 244, 1, 2])), marked);
        assert_eq!(
            out(&advertisement(POD_MAC, "fe80::2", "fd00:10:244:1::2", POD_MAC)),
            marked
        );
        assert_eq!(
            out(&udp(OTHER_MAC, "10.244.1.2", "10.244.2.9")),
            dropped_for("spoofed-mac")
        );
        assert_eq!(
            out(&udp(POD_MAC, "10.244.1.3", "10.244.2.9")),
            dropped_for("spoofed-address")
        );
        assert_eq!(
            out(&udp(POD_MAC, "fd00:10:244:1::3", "fd00:10:244:2::9")),
            dropped_for("spoofed-address")
        );
        assert_eq!(
            out(&udp(POD_MAC, "fe80::2", "fe80::1")),
            dropped_for("spoofed-address")
        );
        assert_eq!(out(&arp(POD_MAC, [10, 244, 1, 1])), dropped_for("spoofed-arp"));
        let stolen = advertisement(POD_MAC, "fe80::2", "fd00:10:244:1::1", POD_MAC);
        assert_eq!(out(&stolen), dropped_for("spoofed-neighbour"));
        let stolen = advertisement(POD_MAC, "fe80::2", "fd00:10:244:1::2", OTHER_MAC);
        assert_eq!(out(&stolen), dropped_for("spoofed-neighbour"));
        assert_eq!(out(&vlan(0x8100, &good)), dropped_for("bad-ethertype"));
        assert_eq!(
            out(&ethernet(POD_MAC, 0x88cc, &[0; 50])),
            dropped_for("bad-ethertype")
        );
        assert_eq!(out(&good[..40]), dropped_for("truncated"));
        datapath.remove_endpoint(DEVICE).unwrap();
        assert_eq!(
            judge(&mut datapath, "from_pod", &good, 0),
            dropped_for("unknown-endpoint")
        );
    });
}

#[test]
fn hostile_headers_from_a_pod() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        open_policies(&mut datapath);
        let mut chain = |kinds: &[u8], last: u8| {
            let mut payload = vec![0x30, 0x39, 0, 80, 0, 8, 0, 0];
            let mut next = last;
            for kind in kinds.iter().rev() {
                payload = [&[next, 0, 0, 0, 0, 0, 0, 0], &payload[..]].concat();
                next = *kind;
            }
            let packet = v6("fd00:10:244:1::2", "fd00:10:244:2::9", next, 64, &payload);
            judge(&mut datapath, "from_pod", &ethernet(POD_MAC, 0x86dd, &packet), 0)
        };
        let marked = Ok((PASS, TUNNEL_MARK | 5));
        assert_eq!(chain(&[0, 60, 43, 44, 60, 135, 139, 140], 17), marked);
        assert_eq!(
            chain(&[60, 0, 60, 0], 17),
            marked,
            "in an order that no standard allows"
        );
        assert_eq!(chain(&[60; 9], 17), dropped_for("extension-headers"));
        assert_eq!(chain(&[60; 8], 60), dropped_for("extension-headers"));
        assert_eq!(
            chain(&[], 60),
            dropped_for("truncated"),
            "a header longer than the packet"
        );
        let mut routed = vec![17, 0, 0, 1, 0, 0, 0, 0, 0x30, 0x39, 0, 80, 0, 8, 0, 0];
        let packet = v6("fd00:10:244:1::2", "fd00:10:244:2::9", 43, 64, &routed);
        let frame = ethernet(POD_MAC, 0x86dd, &packet);
        assert_eq!(
            judge(&mut datapath, "from_pod", &frame, 0),
            dropped_for("source-route")
        );
        routed.truncate(4);
        let packet = v6("fd00:10:244:1::2", "fd00:10:244:2::9", 43, 64, &routed);
        let frame = ethernet(POD_MAC, 0x86dd, &packet);
        assert_eq!(
            judge(&mut datapath, "from_pod", &frame, 0),
            dropped_for("source-route")
        );
    });
}

#[test]
fn to_pod() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let remote4 = udp(OTHER_MAC, "10.244.2.9", "10.244.1.2");
        let remote6 = udp(OTHER_MAC, "fd00:10:244:2::9", "fd00:10:244:1::2");
        assert_eq!(
            judge(&mut datapath, "to_pod", &remote4, TUNNEL_MARK),
            dropped_for("unknown-endpoint")
        );
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        open_policies(&mut datapath);
        set_owners(&mut datapath);
        for frame in [&remote4, &remote6] {
            let mut enter = |mark| judge(&mut datapath, "to_pod", frame, mark);
            assert_eq!(enter(TUNNEL_MARK), Ok((PASS, TUNNEL_MARK)));
            assert_eq!(
                enter(TUNNEL_MARK | 0x4000),
                Ok((PASS, TUNNEL_MARK | 0x4000)),
                "kube-proxy's bit"
            );
            assert_eq!(enter(0), dropped_for("not-from-tunnel"));
            assert_eq!(
                enter(7),
                dropped_for("not-from-tunnel"),
                "a local endpoint's mark"
            );
        }
        for source in [
            "10.96.0.10",
            "192.168.0.1",
            "192.168.0.2",
            "8.8.8.8",
            "10.244.1.7",
        ] {
            let frame = udp(OTHER_MAC, source, "10.244.1.2");
            assert_eq!(
                judge(&mut datapath, "to_pod", &frame, 0),
                Ok((PASS, 0)),
                "{source}"
            );
        }
        drop(datapath);
        let mut datapath = Datapath::open(&crate::Config {
            encryption: false,
            ..config(pins)
        })
        .unwrap();
        assert_eq!(
            judge(&mut datapath, "to_pod", &remote4, 0),
            Ok((PASS, 0)),
            "without encryption"
        );
    });
}

#[test]
fn tun_eg() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let to = |destination: &str| udp(OTHER_MAC, "10.244.1.2", destination);
        assert_eq!(
            judge(&mut datapath, "tun_eg", &to("10.244.2.9"), 5),
            dropped_for("unknown-device")
        );
        datapath.attach(DEVICE, Role::Tunnel { slot: 0 }).unwrap();
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        open_policies(&mut datapath);
        assert_eq!(
            judge(&mut datapath, "tun_eg", &to("10.244.2.9"), 5),
            dropped_for("no-owner")
        );
        set_owners(&mut datapath);
        assert_eq!(
            judge(&mut datapath, "tun_eg", &to("10.244.2.9"), 5),
            dropped_for("no-path")
        );
        datapath
            .set_path(
                2,
                Path {
                    ifindex: DEVICE,
                    receive_slots: 1,
                },
            )
            .unwrap();
        datapath
            .set_path(
                65_535,
                Path {
                    ifindex: 77,
                    receive_slots: 2,
                },
            )
            .unwrap();
        let mut out = |frame: &[u8]| judge(&mut datapath, "tun_eg", frame, 5);
        let judged = TUNNEL_MARK | 5;
        assert_eq!(out(&to("10.244.2.9")), Ok((PASS, judged)));
        assert_eq!(out(&to("192.168.0.2")), Ok((PASS, judged)));
        assert_eq!(
            out(&udp(OTHER_MAC, "fd00:10:244:1::2", "fd00:10:244:2::9")),
            Ok((PASS, judged))
        );
        assert_eq!(out(&to("10.244.3.9")), Ok((REDIRECT, judged)));
        assert_eq!(
            out(&udp(OTHER_MAC, "fd00:10:244:1::2", "fd00:10:244:3::9")),
            Ok((REDIRECT, judged))
        );
        assert_eq!(out(&to("10.244.1.9")), dropped_for("local-destination"));
        assert_eq!(out(&to("10.244.9.9")), dropped_for("no-owner"));
        assert_eq!(out(&to("224.0.0.1")), dropped_for("not-unicast"));
        assert_eq!(out(&arp(POD_MAC, [10, 244, 1, 2])), dropped_for("bad-ethertype"));
        datapath.remove_path(2).unwrap();
        assert_eq!(
            judge(&mut datapath, "tun_eg", &to("10.244.2.9"), 5),
            dropped_for("no-path")
        );
    });
}

#[test]
fn tun_in() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.attach(DEVICE, Role::Tunnel { slot: 1 }).unwrap();
        set_owners(&mut datapath);
        datapath
            .set_path(
                2,
                Path {
                    ifindex: 77,
                    receive_slots: 0b011,
                },
            )
            .unwrap();
        datapath
            .set_path(
                65_535,
                Path {
                    ifindex: 77,
                    receive_slots: 0b101,
                },
            )
            .unwrap();
        let mut enter = |source: &str| {
            let destination = if source.contains(':') {
                "fd00:10:244:1::2"
            } else {
                "10.244.1.2"
            };
            judge(
                &mut datapath,
                "tun_in",
                &udp(OTHER_MAC, source, destination),
                u32::MAX,
            )
        };
        let marked = Ok((PASS, FOREIGN | TUNNEL_MARK));
        assert_eq!(enter("10.244.2.9"), marked);
        assert_eq!(enter("fd00:10:244:2::9"), marked);
        assert_eq!(enter("192.168.0.2"), marked);
        assert_eq!(enter("10.244.3.9"), dropped_for("wrong-slot"));
        assert_eq!(enter("fd00:10:244:3::9"), dropped_for("wrong-slot"));
        assert_eq!(enter("10.244.1.2"), dropped_for("bad-owner"));
        assert_eq!(enter("192.168.0.1"), dropped_for("bad-owner"));
        assert_eq!(enter("8.8.8.8"), dropped_for("bad-owner"));
    });
}

#[test]
fn barrier() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.attach(DEVICE, Role::Barrier).unwrap();
        for (address, own) in [
            ("192.168.0.1", true),
            ("fd00:192::1", true),
            ("192.168.0.2", false),
            ("fd00:192::2", false),
        ] {
            datapath.set_node_address(ip(address), own).unwrap();
        }
        let mut check = |program: &str, expected: &str, pairs: &[(&str, &str)]| {
            for (source, destination) in pairs {
                let frame = udp(OTHER_MAC, source, destination);
                for frame in [vlan(0x88a8, &vlan(0x8100, &frame)), vlan(0x8100, &frame), frame] {
                    let answer = judge(&mut datapath, program, &frame, 0x2005);
                    match expected {
                        "" if program == "barrier_in" => {
                            assert_eq!(answer, Ok((PASS, 0)), "{source} {destination}")
                        }
                        "" => assert_eq!(answer, Ok((PASS, 0x2005)), "{source} {destination}"),
                        reason => assert_eq!(answer, dropped_for(reason), "{source} {destination}"),
                    }
                }
            }
        };
        let mesh = [
            ("10.244.1.2", "10.244.2.9"),
            ("10.244.1.2", "192.168.0.2"),
            ("10.244.1.2", "192.168.0.1"),
            ("192.168.0.1", "10.244.200.9"),
            ("fd00:10:244:1::2", "fd00:10:244:2::9"),
            ("fd00:192::1", "fd00:10:244:2::9"),
            ("fd00:10:244:1::2", "fd00:192::2"),
        ];
        let world = [
            ("10.244.1.2", "8.8.8.8"),
            ("8.8.8.8", "10.244.1.2"),
            ("192.168.0.1", "192.168.0.2"),
            ("fd00:10:244:1::2", "2001:db8::8"),
        ];
        check("barrier_out", "cleartext-out", &mesh);
        check("barrier_out", "", &world);
        check(
            "barrier_in",
            "cleartext-in",
            &[("10.244.2.9", "10.244.1.2"), ("10.244.2.9", "8.8.8.8")],
        );
        check(
            "barrier_in",
            "cleartext-in",
            &[("192.168.0.2", "10.244.1.2"), ("fd00:192::2", "fd00:10:244:1::2")],
        );
        check(
            "barrier_in",
            "own-address",
            &[("192.168.0.1", "10.244.1.2"), ("fd00:192::1", "fd00:192::2")],
        );
        check(
            "barrier_in",
            "",
            &[("8.8.8.8", "10.244.1.2"), ("192.168.0.2", "192.168.0.1")],
        );
        let deep = vlan(
            0x8100,
            &vlan(0x8100, &vlan(0x8100, &udp(OTHER_MAC, "8.8.8.8", "8.8.4.4"))),
        );
        for program in ["barrier_in", "barrier_out"] {
            assert_eq!(judge(&mut datapath, program, &deep, 0), dropped_for("vlan-depth"));
            let short = &udp(OTHER_MAC, "8.8.8.8", "8.8.4.4")[..40];
            assert_eq!(judge(&mut datapath, program, short, 0), dropped_for("truncated"));
            let six = ethernet(OTHER_MAC, 0x0800, &[0x60; 40]);
            assert_eq!(judge(&mut datapath, program, &six, 0), dropped_for("malformed"));
            assert!(judge(&mut datapath, program, &arp(OTHER_MAC, [192, 168, 0, 1]), 0).is_ok());
        }
        datapath.remove_node_address(ip("192.168.0.2")).unwrap();
        assert_eq!(datapath.node_addresses().unwrap().len(), 3);
    });
}

#[test]
fn a_new_mask_encodes_marks_anew() {
    isolated(|pins| {
        let frame = udp(POD_MAC, "10.244.1.2", "10.244.2.9");
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.set_endpoint(&pod(DEVICE)).unwrap();
        datapath
            .set_endpoint(&Endpoint {
                index: 4095,
                ..pod(DEVICE)
            })
            .unwrap();
        let open = PolicyEndpoint {
            policy: 1,
            cidr_table: 1,
            audit: false,
            ingress_open: true,
            egress_open: true,
        };
        datapath.set_policy_endpoint(4095, open).unwrap();
        assert_eq!(judge(&mut datapath, "from_pod", &frame, 0), Ok((PASS, 0x3f7f)));
        drop(datapath);
        let config = crate::Config {
            mark_mask: 0xfff8_0000,
            ..config(pins)
        };
        let mut datapath = Datapath::open(&config).unwrap();
        assert_eq!(
            judge(&mut datapath, "from_pod", &frame, 0xff),
            Ok((PASS, 0xfff8_00ff))
        );
        assert_eq!(
            datapath.endpoints().unwrap(),
            [Endpoint {
                index: 4095,
                ..pod(DEVICE)
            }]
        );
    });
}

#[test]
fn pools_follow_the_configuration() {
    isolated(|pins| {
        let open = |pool: &str| {
            let config = crate::Config {
                pod_pools: vec![net(pool)],
                ..config(pins)
            };
            let mut datapath = Datapath::open(&config).unwrap();
            datapath.attach(DEVICE, Role::Barrier).unwrap();
            open_policies(&mut datapath);
            datapath
        };
        let frame = udp(OTHER_MAC, "10.244.1.2", "10.244.2.9");
        assert_eq!(
            judge(&mut open("10.244.0.0/16"), "barrier_out", &frame, 0),
            dropped_for("cleartext-out")
        );
        assert_eq!(
            judge(&mut open("10.99.0.0/16"), "barrier_out", &frame, 0),
            Ok((PASS, 0))
        );
        assert_eq!(
            dropped(&open("10.244.0.0/16"), "cleartext-out"),
            1,
            "counters are kept"
        );
    });
}
