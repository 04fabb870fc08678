//! What goes through a tunnel, also another tunnel, also the same one.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::places::endpoint_of;
use crate::support::{
    Engine, Lab, Node, PORT,
    capture::Capture,
    peer_line,
    traffic::{Flow, ping, tcp_echo, udp_echo},
    until,
};

/// Both address families inside, over both outside.
pub(super) fn both_families(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    lab.mesh(false)?;
    for outer_v6 in [false, true] {
        // Not at once: a packet that the other end sent before from its other address is authentic, and moves it back.
        until("both ends send to the other family", || {
            for (node, other) in [(a, b), (b, a)] {
                node.must_set(&format!(
                    "{}endpoint={}\n",
                    peer_line(&other.key),
                    other.outer(outer_v6)
                ))?;
            }
            udp_echo(a, b, b.inner_v4(), 1)?;
            let moved = |node: &Node, other: &Node| {
                endpoint_of(node, other).map(|endpoint| endpoint == Some(other.outer(outer_v6)))
            };
            Ok(moved(a, b)? && moved(b, a)?)
        })?;
        for (from, to) in [(a, b), (b, a)] {
            for address in [to.inner_v4(), to.inner_v6()] {
                for bytes in [1, 1_384, 20_000] {
                    udp_echo(from, to, address, bytes)?;
                }
                tcp_echo(from, to, address, 300_000)?;
            }
        }
        ensure!(endpoint_of(a, b)? == Some(b.outer(outer_v6)));
    }
    Ok(())
}

/// What is padded never gets larger than the link may carry, also after that has changed.
pub(super) fn padding(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
    lab.mesh(false)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    ping(a, b.inner_v4(), 56)?;
    let checked = |size: usize, mtu: usize| -> Result<()> {
        let capture = Capture::start(&lab)?;
        let (payload, address) = ((size - 28).to_string(), b.inner_v4().to_string());
        a.exec(&["ping", "-M", "do", "-c", "1", "-W", "5", "-s", &payload, &address])?;
        let seen = capture.finish()?;
        let padded = size.next_multiple_of(16).min(mtu);
        ensure!(seen.largest == padded + 32, "{size} bytes, MTU {mtu}: {seen:?}");
        Ok(())
    };
    for mtu in [1412usize, 1283] {
        a.namespace.ip(&format!("link set {} mtu {mtu}", a.device))?;
        if a.is_ours() {
            // Looks the MTU up.
            a.control("stats warren0")?;
        }
        for size in [mtu, mtu - 1, 65, 84] {
            checked(size, mtu)?;
        }
        // Beyond the link's MTU the stack says so; nothing is sent.
        let large = mtu.to_string();
        let too_large = ["ping", "-M", "do", "-c", "1", "-W", "1", "-s", &large, "10.2.0.1"];
        ensure!(a.exec(&too_large).is_err());
    }
    if !a.is_ours() {
        // What a TUN device hands over does not say by which route it came: this is the kernel's alone.
        let route = format!("route add 10.2.0.1/32 dev {} mtu 1279", a.device);
        a.namespace.ip(&route)?;
        for size in [1279, 1278] {
            checked(size, 1279)?;
        }
    }
    Ok(())
}

/// A peer's address that is reached through another peer: what is sealed for the one is sealed again for the other.
pub(super) fn tunnel_in_tunnel(engines: [Engine; 2]) -> Result<()> {
    let [first, second] = engines;
    let lab = Lab::new([first.clone(), second, first])?;
    let [a, b, c] = &lab.nodes[..] else { unreachable!() };
    // Node 2 forwards to node 3, which node 1 knows only through node 2. Outside, node 1 is 10.1.9.9 to it.
    a.namespace
        .ip(&format!("addr add 10.1.9.9/32 dev {}", a.device))?;
    a.namespace
        .ip(&format!("route add 192.0.2.3/32 dev {} src 10.1.9.9", a.device))?;
    c.namespace.ip("route add 10.1.9.9/32 via 192.0.2.2 dev eth0")?;
    b.exec(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    a.peer(b, false)?;
    a.must_set(&format!("{}allowed_ip=192.0.2.3/32\n", peer_line(&b.key)))?;
    b.peer(a, false)?;
    a.peer(c, false)?;
    c.set_device()?;
    let [v4, v6] = a.prefixes();
    c.must_set(&format!(
        "{}allowed_ip={v4}\nallowed_ip={v6}\n",
        peer_line(&a.key)
    ))?;
    ping(a, c.inner_v4(), 56)?;
    ensure!(endpoint_of(c, a)? == Some(format!("10.1.9.9:{PORT}")));
    for bytes in [100, 1_200, 1_384, 5_000] {
        // The larger ones are sent in fragments: both tunnels are of one device, and so of one MTU.
        udp_echo(a, c, c.inner_v4(), bytes)?;
        udp_echo(c, a, a.inner_v6(), bytes)?;
    }
    tcp_echo(a, c, c.inner_v4(), 300_000)?;
    // Beside it, the tunnel around is a tunnel as before.
    udp_echo(a, b, b.inner_v6(), 1_000)?;
    if a.is_ours() {
        ensure!(a.drops("routing-loop")? == 0);
    }
    Ok(())
}

/// Packets that the device has sent, or dropped.
fn taken(node: &Node) -> Result<u64> {
    let table = node.exec(&["cat", "/proc/net/dev"])?.stdout;
    let table = String::from_utf8(table)?;
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(node.device.as_str())?.strip_prefix(':'));
    let figures: Vec<u64> = line
        .context("no such device")?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // Of transmission: packets and drops.
    Ok(figures[9] + figures[11])
}

fn none_goes_round(node: &Node) -> Result<()> {
    until("none goes round any more", || {
        let before = taken(node)?;
        std::thread::sleep(Duration::from_millis(100));
        Ok(taken(node)? == before)
    })
}

/// Routes that lead what is sealed into the tunnel again: nothing goes round for ever, and all is well once they are gone.
pub(super) fn routing_loops(engines: [Engine; 2]) -> Result<()> {
    let [first, second] = engines;
    let lab = Lab::new([first, second.clone(), second])?;
    let [a, b, c] = &lab.nodes[..] else { unreachable!() };
    lab.mesh(false)?;
    ping(a, b.inner_v4(), 56)?;
    ping(a, c.inner_v4(), 56)?;
    // A peer by way of itself; then two, each by way of the other.
    for (by_b, by_c) in [("192.0.2.2/32", ""), ("192.0.2.3/32", "192.0.2.2/32")] {
        let routes: Vec<&str> = [by_b, by_c]
            .into_iter()
            .filter(|route| !route.is_empty())
            .collect();
        for (peer, allowed) in [(b, by_b), (c, by_c)] {
            let [v4, v6] = peer.prefixes();
            let own = format!("replace_allowed_ips=true\nallowed_ip={v4}\nallowed_ip={v6}\n");
            let more = if allowed.is_empty() {
                String::new()
            } else {
                format!("allowed_ip={allowed}\n")
            };
            a.must_set(&format!("{}{own}{more}", peer_line(&peer.key)))?;
        }
        for route in &routes {
            a.namespace.ip(&format!("route add {route} dev {}", a.device))?;
        }
        let flow = Flow::start(a, b, b.inner_v4(), 200, 1_000)?;
        until("packets go round", || Ok(flow.sent() >= 60))?;
        let figures = flow.finish()?;
        ensure!(figures.lost == figures.sent, "{by_b} {by_c}: {figures:?}");
        // The kernel's own go round until the routes are gone.
        if a.is_ours() {
            none_goes_round(a)?;
        }
        for route in &routes {
            a.namespace.ip(&format!("route del {route} dev {}", a.device))?;
        }
        udp_echo(a, b, b.inner_v4(), 1_000)?;
        udp_echo(a, c, c.inner_v6(), 1_000)?;
    }
    if a.is_ours() {
        ensure!(a.drops("routing-loop")? >= 60, "{}", a.drops("routing-loop")?);
    }
    Ok(())
}
