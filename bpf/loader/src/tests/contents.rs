//! What is written to the policy maps, and what is read from them.

use super::{config, ip, isolation::isolated, net};
use crate::{
    Datapath, Error, PolicyAnswer, PolicyContents, PolicyDirection, PolicyEndpoint, PolicyOutcome,
    PolicyPeerKind, PolicyPort, PolicyPortKey, PolicyQuestion, PolicyVerdict, PolicyVerdictKey,
};

const TCP: u8 = 6;

fn endpoint(policy: u32) -> PolicyEndpoint {
    PolicyEndpoint {
        policy,
        cidr_table: 9,
        audit: false,
        ingress_open: false,
        egress_open: false,
    }
}

fn port(policy: u32, direction: PolicyDirection, bits: u32, length: u8) -> PolicyPortKey {
    PolicyPortKey {
        policy,
        direction,
        bits,
        length,
    }
}

fn verdict(class: u32, kind: PolicyPeerKind, id: u32) -> PolicyVerdictKey {
    PolicyVerdictKey { class, kind, id }
}

/// Policy 1: port 80 for identity 300 by rule 5, but not for 301 (rule 6); 8.8.0.0/16 on every port (rule 7), without
/// 8.8.8.0/24 (rule 8); as a pod, 10.0.0.0/8 on every port (rule 9).
fn contents() -> PolicyContents {
    let mut contents = PolicyContents::default();
    contents.endpoints.insert(5, endpoint(1));
    let ingress = PolicyDirection::Ingress;
    let class = |class, has_cidrs| PolicyPort { class, has_cidrs };
    contents.ports.insert(port(1, ingress, 0, 0), class(10, true));
    contents
        .ports
        .insert(port(1, ingress, 0x06_0050, 24), class(11, true));
    let mut set = |key, allow, rule| contents.verdicts.insert(key, PolicyVerdict { allow, rule });
    set(verdict(11, PolicyPeerKind::Identity, 300), true, 5);
    set(verdict(11, PolicyPeerKind::Identity, 301), false, 6);
    for class in [10, 11] {
        set(verdict(class, PolicyPeerKind::WorldPrefix, 1), true, 7);
        set(verdict(class, PolicyPeerKind::WorldPrefix, 2), false, 8);
        set(verdict(class, PolicyPeerKind::MemberPrefix, 3), true, 9);
    }
    for (prefix, number) in [
        ("8.8.0.0/16", 1),
        ("8.8.8.0/24", 2),
        ("10.0.0.0/8", 3),
        ("2001:db8::/32", 1),
    ] {
        contents.cidrs.insert((9, net(prefix)), number);
    }
    contents
}

fn write(datapath: &mut Datapath, contents: &PolicyContents) {
    for (key, value) in &contents.verdicts {
        datapath.set_policy_verdict(*key, *value).unwrap();
    }
    for ((table, prefix), number) in &contents.cidrs {
        datapath.set_policy_cidr(*table, *prefix, *number).unwrap();
    }
    for (key, value) in &contents.ports {
        datapath.set_policy_port(*key, *value).unwrap();
    }
    for (index, value) in &contents.endpoints {
        datapath.set_policy_endpoint(*index, *value).unwrap();
    }
}

#[test]
fn policies_are_adopted() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert_eq!(datapath.policy_contents().unwrap(), PolicyContents::default());
        write(&mut datapath, &contents());
        assert_eq!(datapath.policy_contents().unwrap(), contents());
        drop(datapath);
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert_eq!(datapath.policy_contents().unwrap(), contents(), "adopted");
        datapath.policy_grace().unwrap();
        for _ in 0..2 {
            for key in contents().verdicts.keys() {
                datapath.remove_policy_verdict(*key).unwrap();
            }
            for (table, prefix) in contents().cidrs.keys() {
                datapath.remove_policy_cidr(*table, *prefix).unwrap();
            }
            for key in contents().ports.keys() {
                datapath.remove_policy_port(*key).unwrap();
            }
            datapath.remove_policy_endpoint(5).unwrap();
        }
        assert_eq!(datapath.policy_contents().unwrap(), PolicyContents::default());
    });
}

#[test]
fn what_the_maps_cannot_hold_is_refused() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let refused = datapath.set_policy_endpoint(4096, endpoint(1));
        assert!(matches!(refused, Err(Error::Invalid(_))));
        datapath.set_policy_endpoint(0, endpoint(1)).unwrap();
        let port = port(1, PolicyDirection::Egress, 0x06_0050, 16);
        let refused = datapath.set_policy_port(
            port,
            PolicyPort {
                class: 1,
                has_cidrs: false,
            },
        );
        assert!(matches!(refused, Err(Error::Invalid(_))));
    });
}

#[test]
fn the_answer_of_the_maps() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        write(&mut datapath, &contents());
        let ask = |datapath: &Datapath, peer, address, port| {
            let question = PolicyQuestion {
                endpoint: 5,
                direction: PolicyDirection::Ingress,
                peer,
                address: ip(address),
                protocol: TCP,
                port,
            };
            datapath.judge(&question).unwrap()
        };
        let is = |outcome| PolicyAnswer {
            outcome,
            audit: false,
        };
        let allowed = |rule| is(PolicyOutcome::Allowed { rule });
        let denied = |rule| is(PolicyOutcome::Denied { rule });
        let by_default = is(PolicyOutcome::DefaultDeny);
        assert_eq!(ask(&datapath, 300, "10.1.0.1", 80), allowed(5));
        assert_eq!(ask(&datapath, 300, "11.1.0.1", 81), by_default);
        assert_eq!(ask(&datapath, 301, "10.1.0.1", 80), denied(6), "deny wins");
        assert_eq!(ask(&datapath, 301, "10.1.0.1", 81), allowed(9));
        assert_eq!(ask(&datapath, 2, "8.8.4.4", 80), allowed(7));
        assert_eq!(ask(&datapath, 2, "2001:db8::1", 80), allowed(7));
        assert_eq!(ask(&datapath, 2, "8.8.8.8", 80), denied(8));
        assert_eq!(
            ask(&datapath, 2, "10.1.0.1", 80),
            by_default,
            "a prefix for members only"
        );
        assert_eq!(
            ask(&datapath, 300, "8.8.8.8", 80),
            allowed(5),
            "a prefix for the world only"
        );
        let audit = PolicyEndpoint {
            audit: true,
            egress_open: true,
            ..endpoint(1)
        };
        datapath.set_policy_endpoint(5, audit).unwrap();
        let answer = ask(&datapath, 301, "10.1.0.1", 80);
        assert!(answer.audit && answer.outcome == PolicyOutcome::Denied { rule: 6 });
        let open = PolicyEndpoint {
            ingress_open: true,
            ..endpoint(1)
        };
        datapath.set_policy_endpoint(5, open).unwrap();
        assert_eq!(ask(&datapath, 301, "10.1.0.1", 80), is(PolicyOutcome::Open));
        datapath.remove_policy_endpoint(5).unwrap();
        assert_eq!(ask(&datapath, 300, "10.1.0.1", 80), is(PolicyOutcome::Closed));
        assert!(!PolicyOutcome::Closed.allows() && !PolicyOutcome::DefaultDeny.allows());
    });
}

#[test]
fn full_maps_are_reported_and_counted() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let usage = |datapath: &Datapath, map: &str| {
            let all = datapath.usage().unwrap();
            let usage = all.into_iter().find(|usage| usage.map == map).unwrap();
            (usage.entries, usage.limit)
        };
        assert_eq!(usage(&datapath, "POLICY_CIDRS4"), (0, 65_536));
        let mut written = 0;
        let error = loop {
            let [_, a, b, c] = u32::to_be_bytes(written);
            let prefix = ipnet::Ipv4Net::new([10, a, b, c].into(), 32).unwrap();
            match datapath.set_policy_cidr(1, prefix.into(), written) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(written, 65_536);
        assert!(
            matches!(
                error,
                Error::Full {
                    map: "POLICY_CIDRS4",
                    limit: 65_536
                }
            ),
            "{error}"
        );
        assert_eq!(usage(&datapath, "POLICY_CIDRS4"), (65_536, 65_536));
        let cidr = net("10.0.0.7/32");
        datapath.set_policy_cidr(1, cidr, 1).unwrap();
        datapath.remove_policy_cidr(1, cidr).unwrap();
        assert_eq!(usage(&datapath, "POLICY_CIDRS4"), (65_535, 65_536));
        assert_eq!(datapath.policy_contents().unwrap().cidrs.len(), 65_535);
        assert_eq!(usage(&datapath, "POLICY_CIDRS6").0, 0);
        for id in 0..10_000 {
            let key = verdict(1, PolicyPeerKind::Identity, id);
            let value = PolicyVerdict {
                allow: true,
                rule: id,
            };
            datapath.set_policy_verdict(key, value).unwrap();
        }
        assert_eq!(usage(&datapath, "POLICY_VERDICT").0, 10_000);
        assert_eq!(datapath.policy_contents().unwrap().verdicts.len(), 10_000);
    });
}

#[test]
fn revisions_are_never_zero() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert_eq!(datapath.revision().unwrap(), 1);
        assert_eq!(datapath.raise_revision().unwrap(), 2);
        datapath.set_flow_limit(77).unwrap();
        drop(datapath);
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert_eq!(datapath.revision().unwrap(), 2, "adopted");
        let mut state = datapath.maps.flows.state.get().unwrap();
        assert_eq!(state.limit, 77, "adopted");
        assert_eq!(state.node_ports, 30_000 << 16 | 32_767);
        assert_eq!(state.wireguard_ports, 51_871 << 16 | 51_873);
        state.revision = u32::MAX;
        datapath.maps.flows.state.set(state).unwrap();
        assert_eq!(datapath.raise_revision().unwrap(), 1);
    });
}
