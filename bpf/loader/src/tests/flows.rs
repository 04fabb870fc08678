//! Collecting flows. They are written here as the programs write them.

use std::time::Duration;

use warren_abi::{FLOW_EGRESS, FLOW_FIN_LOCAL, FLOW_JUDGED, FLOW_REPLY, FlowKey, FlowValue};

use super::{config, isolation::isolated};
use crate::{Datapath, FlowPhase, PolicyDirection, maps::Plain};

fn key(endpoint: u16, port: u32) -> Plain<FlowKey> {
    let [_, high, middle, low] = port.to_be_bytes();
    let mut local = [0; 16];
    local[..4].copy_from_slice(&[10, 244, 1, high]);
    let mut remote = [0; 16];
    remote[..4].copy_from_slice(&[10, 244, 2, 9]);
    Plain(FlowKey {
        local,
        remote,
        local_port: [middle, low],
        remote_port: [0, 80],
        endpoint,
        protocol: 6,
        family: 4,
    })
}

fn value(last_seen: u32, flags: u8) -> FlowValue {
    FlowValue {
        last_seen,
        lifetime: 60,
        created: 1,
        revision: 3,
        rule: 4,
        peer: 300,
        flags: FLOW_JUDGED | FLOW_EGRESS | flags,
        ..FlowValue::default()
    }
}

#[test]
fn flows_that_are_over_go() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let flows = &mut datapath.maps.flows;
        for port in 0..30_000 {
            // Every third one was last seen just in time, and one in the future.
            let seen = if port % 3 == 0 { 940 } else { 939 };
            flows
                .established
                .set(key(5, port), value(seen, FLOW_REPLY))
                .unwrap();
        }
        flows
            .established
            .set(key(6, 1), value(1_005, FLOW_REPLY))
            .unwrap();
        flows.new.set(key(7, 1), value(1_000, 0)).unwrap();
        flows.new.set(key(7, 2), value(900, 0)).unwrap();
        flows.counts.set(8, 12).unwrap();
        let report = datapath.collect_flows(Duration::from_millis(1_000_999)).unwrap();
        assert_eq!(
            (report.established, report.new, report.removed),
            (10_001, 1, 20_001)
        );
        let counts: Vec<_> = report.by_endpoint.into_iter().collect();
        assert_eq!(counts, [(5, 10_000), (6, 1), (7, 1)]);
        let counts = datapath.maps.flows.counts.all().unwrap();
        assert_eq!(counts.len(), 4_096);
        assert_eq!(counts[5..9], [10_000, 1, 1, 0], "counted anew");
        assert_eq!(datapath.maps.flows.state.get().unwrap().collected, 1_000);
        assert_eq!(datapath.flows(Some(5), usize::MAX).unwrap().len(), 10_000);
        assert_eq!(datapath.flows(None, usize::MAX).unwrap().len(), 10_002);
        assert_eq!(datapath.flows(None, 7).unwrap().len(), 7);
        datapath.forget_flows(5).unwrap();
        datapath.forget_flows(7).unwrap();
        let left = datapath.flows(None, usize::MAX).unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(datapath.maps.flows.counts.all().unwrap()[5..9], [0, 1, 0, 0]);
    });
}

#[test]
fn what_is_told_of_a_flow() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        let tell = |datapath: &mut Datapath, value: FlowValue| {
            datapath.maps.flows.established.set(key(5, 4_000), value).unwrap();
            datapath.flows(None, 10).unwrap().remove(0)
        };
        let flow = tell(&mut datapath, value(70, FLOW_REPLY));
        assert_eq!(flow.local, "10.244.1.0:4000".parse().unwrap());
        assert_eq!(flow.remote, "10.244.2.9:80".parse().unwrap());
        assert_eq!(
            (flow.endpoint, flow.peer, flow.rule, flow.protocol),
            (5, 300, 4, 6)
        );
        assert_eq!(flow.direction, PolicyDirection::Egress);
        assert_eq!(flow.state, FlowPhase::Established);
        assert_eq!(
            (flow.last_seen, flow.lifetime),
            (Duration::from_secs(70), Duration::from_secs(60))
        );
        assert_eq!(tell(&mut datapath, value(70, 0)).state, FlowPhase::New);
        assert_eq!(
            tell(&mut datapath, value(70, FLOW_REPLY | FLOW_FIN_LOCAL)).state,
            FlowPhase::Closing
        );
        let unjudged = FlowValue {
            flags: 0,
            ..value(70, 0)
        };
        let flow = tell(&mut datapath, unjudged);
        assert_eq!(
            (flow.state, flow.direction),
            (FlowPhase::Untranslated, PolicyDirection::Ingress)
        );
    });
}

/// Prints what a collection of many flows takes; its time depends on the machine.
#[test]
fn many_flows_are_collected() {
    isolated(|pins| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        for port in 0..250_000 {
            let flows = &mut datapath.maps.flows;
            flows
                .established
                .set(key(5, port), value(1_000, FLOW_REPLY))
                .unwrap();
        }
        for (now, left) in [(1_000, 250_000), (2_000, 0)] {
            let start = std::time::Instant::now();
            let report = datapath.collect_flows(Duration::from_secs(now)).unwrap();
            println!("{left} of 250,000 left after {:?}", start.elapsed());
            assert_eq!(report.established, left);
        }
    });
}
