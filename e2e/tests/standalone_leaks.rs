//! What must not leak does not: nothing between the nodes is ever in clear, and what is dropped instead is
//! counted. Each scenario has its power check: the same packets with encryption off are seen in clear.

use anyhow::{Result, ensure};
use warren_e2e::{
    app::ask::Protocol,
    capture::Injector,
    forge::{Tag, ethernet, ip_packet, udp},
    lab::{
        Lab, LabOptions, PORT, Pod, PodSpec, ask_from,
        manifests::node_file,
        net::{BRIDGE, UPLINK, node_address, node_mac, pod_cidrs},
        wait::{wait_for, wait_until},
    },
    scenario::{
        DropCounter, Flows, PATIENCE, at, client_and_server, insist, nothing_in_clear, two_nodes,
        wait_answers,
    },
};

/// With encryption off `traffic` must be seen in clear, or the scenario proves nothing.
fn power_check(traffic: impl FnOnce(&Lab, &Pod, &Pod) -> Result<()>) -> Result<()> {
    Lab::run(two_nodes(false), |lab| {
        let (client, server) = client_and_server(lab)?;
        let capture = lab.capture()?;
        traffic(lab, &client, &server)?;
        let counts = capture.finish()?;
        ensure!(counts.plaintext > 100, "the power check saw only {counts:?}");
        Ok(())
    })
}

/// How packets end that have no route into the tunnel: the blackholes'.
const NO_WAY: &[&str] = &["stack-blackhole", "stack-no-route", "no-owner", "no-path"];
/// How packets end in front of a device that nobody reads from.
const NO_ENGINE: &[&str] = &[
    "stack-dev-ready",
    "stack-qdisc-drop",
    "stack-tun-queue-purge",
    "stack-full-ring",
];

#[test]
fn peer_unknown() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        let drops = DropCounter::start(&node)?;
        lab.manifests().remove(&node_file("node2"))?;
        wait_for(PATIENCE, "node1 has forgotten its peer", || {
            node.encrypt_status().is_ok_and(|status| status.peers.is_empty())
        })?;
        insist(&client, server.addresses())?;
        nothing_in_clear(&capture.finish()?)?;
        drops.wait_for(&node, NO_WAY, 2000)
    })?;
    power_check(|lab, client, server| {
        lab.manifests().remove(&node_file("node2"))?;
        insist(client, server.addresses())
    })
}

#[test]
fn tunnel_process_killed() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        let flows = Flows::start(&client, &server)?;
        for _ in 0..3 {
            node.kill_tunnel()?;
            wait_for(PATIENCE, "a new tunnel process runs", || {
                node.tunnels().is_ok_and(|pids| !pids.is_empty())
            })?;
        }
        wait_answers(&client, &server)?;
        for report in flows.finish()? {
            ensure!(report.received > 0, "{report:?}");
        }
        lab.wait_ready(PATIENCE)?;
        nothing_in_clear(&capture.finish()?)
    })?;
    power_check(|_, client, server| insist(client, server.addresses()))
}

#[test]
fn tunnel_process_killed_and_no_agent_to_restart_it() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        let drops = DropCounter::start(&node)?;
        node.kill_agent()?;
        node.kill_tunnel()?;
        insist(&client, server.addresses())?;
        // The other end still sends: it must not fall back either.
        insist(&server, client.addresses())?;
        node.start_agent()?;
        lab.wait_ready(PATIENCE)?;
        wait_answers(&client, &server)?;
        nothing_in_clear(&capture.finish()?)?;
        drops.wait_for(&node, NO_ENGINE, 1500)
    })?;
    power_check(|_, client, server| insist(client, server.addresses()))
}

#[test]
fn tunnel_device_deleted() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        let flows = Flows::start(&client, &server)?;
        node.run(["ip", "link", "del", "warren0"])?;
        lab.wait_ready(PATIENCE)?;
        wait_answers(&client, &server)?;
        wait_answers(&server, &client)?;
        for report in flows.finish()? {
            ensure!(report.received > 0, "{report:?}");
        }
        nothing_in_clear(&capture.finish()?)
    })?;
    power_check(|_, client, server| insist(client, server.addresses()))
}

#[test]
fn tunnel_device_deleted_and_no_agent_to_make_it_anew() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        node.kill_agent()?;
        node.run(["ip", "link", "del", "warren0"])?;
        insist(&client, server.addresses())?;
        node.start_agent()?;
        lab.wait_ready(PATIENCE)?;
        wait_answers(&client, &server)?;
        nothing_in_clear(&capture.finish()?)
    })
}

/// Removes every route and rule of ours, so that the underlay's own routes apply.
fn flush_routes(lab: &Lab) -> Result<()> {
    let node = lab.node(1);
    for family in ["-4", "-6"] {
        for table in ["4151", "4152"] {
            // A table that is empty in this family does not exist.
            node.place()
                .output(["ip", family, "route", "flush", "table", table])?;
        }
        for pref in ["90", "91"] {
            while node
                .place()
                .output(["ip", family, "rule", "del", "pref", pref])?
                .status
                .success()
            {}
        }
    }
    Ok(())
}

#[test]
fn routes_flushed() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        // Without an agent nobody repairs them: the nft barrier is alone, then the programs' barrier.
        for (reason, alone) in [("nft-clear-out", false), ("cleartext-out", true)] {
            let drops = DropCounter::start(&node)?;
            node.kill_agent()?;
            flush_routes(lab)?;
            if alone {
                node.run(["nft", "delete", "table", "inet", "warren"])?;
            }
            insist(&client, server.addresses())?;
            let host = ask_from(
                &node.place(),
                Protocol::Udp,
                at(server.address(false)?, PORT),
                64,
                500,
            );
            ensure!(host.is_err(), "the host reached a pod without a tunnel: {host:?}");
            node.start_agent()?;
            lab.wait_ready(PATIENCE)?;
            wait_answers(&client, &server)?;
            drops.wait_for(&node, &[reason], 2000)?;
        }
        // With an agent they are repaired.
        flush_routes(lab)?;
        wait_answers(&client, &server)?;
        nothing_in_clear(&capture.finish()?)
    })?;
    power_check(|lab, client, server| {
        flush_routes(lab)?;
        insist(client, server.addresses())
    })
}

/// Leads the server's prefixes into an overlay device that appears now, as a careless operator might.
fn overlay_appears(lab: &Lab, server: &Pod) -> Result<()> {
    let node = lab.node(1);
    let remote = node_address(2).v4;
    let mut lines = vec![
        format!("link add vx0 mtu 1450 type vxlan id 7 remote {remote} dstport 8472 dev {UPLINK}"),
        "link set vx0 up".to_owned(),
    ];
    for (address, cidr) in server.addresses().iter().zip(pod_cidrs(2)) {
        lines.push(format!("route replace {cidr} dev vx0"));
        lines.push(format!(
            "neigh replace {address} lladdr 02:77:00:00:00:02 dev vx0 nud permanent"
        ));
    }
    node.place().ip(&lines)
}

#[test]
fn overlay_device_appears() -> Result<()> {
    // With an agent that sees the device coming, and without one.
    for agent in [true, false] {
        Lab::run(two_nodes(true), |lab| {
            let (client, server) = client_and_server(lab)?;
            let node = lab.node(1);
            let capture = lab.capture()?;
            if !agent {
                node.kill_agent()?;
            }
            overlay_appears(lab, &server)?;
            if agent {
                node.kill_agent()?;
            }
            flush_routes(lab)?;
            insist(&client, server.addresses())?;
            node.start_agent()?;
            lab.wait_ready(PATIENCE)?;
            wait_answers(&client, &server)?;
            nothing_in_clear(&capture.finish()?)
        })?;
    }
    power_check(|lab, client, server| {
        overlay_appears(lab, server)?;
        flush_routes(lab)?;
        insist(client, server.addresses())
    })
}

#[test]
fn agent_never_started_after_boot() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let (first, second) = (lab.node(1), lab.node(2));
        let gone: Vec<_> = server.addresses().to_vec();
        second.power_off()?;
        second.boot()?;
        lab.connect(&second)?;
        let capture = lab.capture()?;
        // No pod comes to life there.
        let error = match lab.add_pod(PodSpec::new("early", 2)) {
            Ok(_) => anyhow::bail!("a pod was added on a node without an agent"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(
            error.contains("agent"),
            "the error does not name the agent: {error}"
        );
        // The others go on encrypting towards it.
        insist(&client, &gone)?;
        nothing_in_clear(&capture.finish()?)?;
        // What its host sends in clear (nothing of ours runs there) is dropped on arrival and not answered.
        let capture = lab.capture()?;
        let drops = DropCounter::start(&first)?;
        for address in client.addresses() {
            let host = ask_from(&second.place(), Protocol::Udp, at(*address, PORT), 64, 1000);
            ensure!(host.is_err(), "a pod answered a packet in clear: {host:?}");
        }
        drops.wait_for(&first, &["cleartext-in", "not-from-tunnel"], 2)?;
        let counts = capture.finish()?;
        ensure!(
            !counts.plaintext_by_port.contains_key(&first.port()),
            "{counts:?}"
        );
        second.start_agent()?;
        lab.wait_ready(PATIENCE)?;
        wait_answers(&client, &lab.add_pod(PodSpec::new("late", 2))?)
    })?;
    power_check(|_, client, server| insist(client, server.addresses()))
}

#[test]
fn terminating_pod_still_sending() -> Result<()> {
    let terminate = |client: &mut Pod, server: &Pod| -> Result<()> {
        let flows = Flows::start(client, server)?;
        client.begin_termination()?;
        insist(client, server.addresses())?;
        flows.finish().map(drop)
    };
    Lab::run(two_nodes(true), |lab| {
        let (mut client, server) = client_and_server(lab)?;
        let capture = lab.capture()?;
        terminate(&mut client, &server)?;
        // And without an agent, which may have forgotten it for good.
        lab.node(1).kill_agent()?;
        insist(&client, server.addresses())?;
        lab.node(1).start_agent()?;
        lab.wait_ready(PATIENCE)?;
        insist(&client, server.addresses())?;
        lab.delete_pod(client)?;
        nothing_in_clear(&capture.finish()?)
    })?;
    Lab::run(two_nodes(false), |lab| {
        let (mut client, server) = client_and_server(lab)?;
        let capture = lab.capture()?;
        terminate(&mut client, &server)?;
        ensure!(capture.finish()?.plaintext > 100, "the power check saw nothing");
        Ok(())
    })
}

/// Packets of each kind that are forged.
const FORGED: u64 = 100;

/// Sends datagrams that claim to come from `client` to `server` onto the underlay, addressed to node2: bare, with a
/// VLAN tag, with two.
fn forge(lab: &Lab, client: &Pod, server: &Pod) -> Result<()> {
    // Somebody on the underlay, no node.
    let attacker = Injector::open(lab.underlay(), BRIDGE)?;
    for tags in [&[][..], &[Tag::Vlan(5)], &[Tag::Service(6), Tag::Vlan(5)]] {
        for v6 in [false, true] {
            let (source, destination) = (client.address(v6)?, server.address(v6)?);
            let datagram = udp(source, destination, (4000, PORT), b"forged");
            let frame = ethernet(
                [2, 0x66, 0, 0, 0, 1],
                node_mac(2),
                tags,
                &ip_packet(source, destination, 17, &datagram),
            );
            for _ in 0..FORGED {
                attacker.send(&frame)?;
            }
        }
    }
    Ok(())
}

#[test]
fn forged_plaintext_from_the_underlay() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(2);
        let capture = lab.capture()?;
        let drops = DropCounter::start(&node)?;
        let encrypted_before = capture.counts().encrypted;
        forge(lab, &client, &server)?;
        drops.wait_for(&node, &["cleartext-in", "not-from-tunnel"], 6 * FORGED)?;
        // The server answers what it gets, through the tunnel: it got nothing.
        let counts = capture.finish()?;
        nothing_in_clear(&counts)?;
        ensure!(
            counts.encrypted - encrypted_before < FORGED,
            "somebody answered: {counts:?}"
        );
        Ok(())
    })?;
    Lab::run(two_nodes(false), |lab| {
        let (client, server) = client_and_server(lab)?;
        let capture = lab.capture()?;
        forge(lab, &client, &server)?;
        // The bare ones are delivered and answered in clear (tagged ones need a VLAN device to be delivered).
        wait_until(PATIENCE, "the answers", || {
            let counts = capture.counts();
            ensure!(
                counts.plaintext_by_port.get("p2") >= Some(&(2 * FORGED)),
                "{counts:?}"
            );
            Ok(())
        })
    })
}

#[test]
fn a_pod_that_lies_about_its_address_is_not_believed() -> Result<()> {
    let lie = |client: &Pod, server: &Pod| -> Result<()> {
        let injector = Injector::open(&client.place(), "eth0")?;
        let gateway = client.place().run(["cat", "/sys/class/net/eth0/address"])?;
        let mac = |text: &str| -> Result<[u8; 6]> {
            let bytes: Vec<_> = text
                .trim()
                .split(':')
                .map(|b| u8::from_str_radix(b, 16))
                .collect::<Result<_, _>>()?;
            bytes
                .try_into()
                .map_err(|_| anyhow::anyhow!("{text} is no MAC address"))
        };
        let own = mac(&gateway)?;
        let host = client.node().run([
            "cat",
            &format!("/sys/class/net/{}/address", client.host_interface()?),
        ])?;
        for (source, destination) in [
            ("10.244.1.200".parse()?, server.address(false)?),
            ("fd00:10:244:1::200".parse()?, server.address(true)?),
        ] {
            let datagram = udp(source, destination, (4000, PORT), b"spoofed");
            let frame = ethernet(
                own,
                mac(&host)?,
                &[],
                &ip_packet(source, destination, 17, &datagram),
            );
            for _ in 0..FORGED {
                injector.send(&frame)?;
            }
        }
        Ok(())
    };
    Lab::run(two_nodes(true), |lab| {
        let (client, server) = client_and_server(lab)?;
        let node = lab.node(1);
        let capture = lab.capture()?;
        let drops = DropCounter::start(&node)?;
        lie(&client, &server)?;
        drops.wait_for(&node, &["spoofed-address"], 2 * FORGED)?;
        nothing_in_clear(&capture.finish()?)
    })?;
    // Without Warren at all: its programs judge addresses also where nothing is encrypted.
    let plain = LabOptions {
        warren: false,
        ..two_nodes(false)
    };
    Lab::run(plain, |lab| {
        let (client, server) = client_and_server(lab)?;
        let capture = lab.capture()?;
        lie(&client, &server)?;
        wait_for(PATIENCE, "the lies are seen", || {
            capture.counts().plaintext >= FORGED
        })
    })
}
