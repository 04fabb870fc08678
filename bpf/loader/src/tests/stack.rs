//! Drops by the kernel's stack: counted with the kernel's reason, for this network namespace only.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use super::{
    config,
    isolation::{Peer, ip as ip_command, isolated},
};
use crate::{Datapath, DropCount};

fn by_stack(datapath: &Datapath) -> Vec<DropCount> {
    let mut drops = datapath.drops_by_hook().unwrap();
    drops.retain(|count| count.hook == "stack");
    drops
}

/// A router between a peer and a prefix that is a blackhole.
fn route_into_nothing() -> Peer {
    let peer = Peer::new();
    ip_command(&format!(
        "link add veth0 type veth peer name eth0 netns {}",
        peer.thread
    ));
    ip_command("addr add 192.0.2.1/24 dev veth0");
    ip_command("-6 addr add 2001:db8::1/64 dev veth0 nodad");
    ip_command("link set veth0 up");
    ip_command("route add blackhole 198.51.100.0/24");
    ip_command("-6 route add blackhole 2001:db8:1::/64");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    peer.run(|| {
        ip_command("addr add 192.0.2.2/24 dev eth0");
        ip_command("-6 addr add 2001:db8::2/64 dev eth0 nodad");
        ip_command("link set eth0 up");
        ip_command("route add default via 192.0.2.1");
        ip_command("-6 route add default via 2001:db8::1");
    });
    peer
}

#[test]
fn a_blackhole_is_counted() {
    isolated(|pins| {
        let datapath = Datapath::open(&config(pins)).unwrap();
        let peer = route_into_nothing();
        for (target, reasons) in [
            ("198.51.100.9:9", ["stack-no-route", "stack-ip-innoroutes"]),
            ("[2001:db8:1::9]:9", ["stack-blackhole", "stack-ip-innoroutes"]),
        ] {
            let before = by_stack(&datapath);
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                peer.run(move || {
                    let any = if target.starts_with('[') {
                        "[::]:0"
                    } else {
                        "0.0.0.0:0"
                    };
                    drop(UdpSocket::bind(any).expect("binds").send_to(b"warren", target));
                });
                let after = by_stack(&datapath);
                let grown: Vec<_> = after.iter().filter(|count| !before.contains(count)).collect();
                println!("{target}: {after:?}");
                if grown.iter().any(|count| reasons.contains(&count.reason.as_str())) {
                    break;
                }
                assert!(Instant::now() < deadline, "no drop was counted");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
}
