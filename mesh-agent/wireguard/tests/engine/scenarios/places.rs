//! Where the ends are, and that they move.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::support::{
    self, Engine, Lab, Node, PORT,
    capture::Capture,
    peer_line,
    traffic::{Flow, ping, udp_echo},
    until,
};

/// What a node says of another.
pub(super) fn endpoint_of(node: &Node, peer: &Node) -> Result<Option<String>> {
    let answer = node.shown()?;
    let key = peer_line(&peer.key);
    let lines = answer.split(key.trim()).nth(1).context("no such peer")?;
    let mut lines = lines.lines().take_while(|line| !line.starts_with("public_key="));
    Ok(lines.find_map(|line| line.strip_prefix("endpoint=").map(str::to_owned)))
}

/// Each end moves to another address, over both families, while the other sends.
pub(super) fn roaming(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    lab.mesh(false)?;
    ping(a, b.inner_v4(), 56)?;
    for (node, other) in [(a, b), (b, a)] {
        let number = node.number;
        node.namespace
            .ip(&format!("addr add 192.0.2.1{number}/24 dev eth0"))?;
        node.namespace
            .ip(&format!("addr del 192.0.2.{number}/24 dev eth0"))?;
        // Removing the first address may take the others of its network along.
        let _ = node
            .namespace
            .ip(&format!("addr add 192.0.2.1{number}/24 dev eth0"));
        udp_echo(node, other, other.inner_v4(), 100)?;
        until("the other end follows", || {
            Ok(endpoint_of(other, node)? == Some(format!("192.0.2.1{number}:{PORT}")))
        })?;
        udp_echo(other, node, node.inner_v6(), 1_000)?;
    }
    // From IPv4 to IPv6: told by configuration, learned by the other.
    a.must_set(&format!("{}endpoint=[2001:db8::2]:{PORT}\n", peer_line(&b.key)))?;
    udp_echo(a, b, b.inner_v4(), 100)?;
    until("the other end follows to IPv6", || {
        Ok(endpoint_of(b, a)? == Some(format!("[2001:db8::1]:{PORT}")))
    })?;
    udp_echo(b, a, a.inner_v4(), 1_000)
}

/// Node 1 is behind node 3, which translates its address and forgets it after a second or two.
pub(super) fn nat_with_timeouts(engines: [Engine; 2]) -> Result<()> {
    let [inside, far] = engines;
    let lab = Lab::new([inside.clone(), far, inside])?;
    let [inside, far, router] = &lab.nodes[..] else {
        unreachable!()
    };
    inside.namespace.ip(&format!(
        "link add nat0 type veth peer name nat1 netns {}",
        router.namespace.name()
    ))?;
    for (node, device, address) in [(inside, "nat0", 1), (router, "nat1", 2)] {
        node.namespace
            .ip(&format!("addr add 172.31.0.{address}/30 dev {device}"))?;
        node.namespace.ip(&format!("link set {device} up"))?;
    }
    inside.namespace.ip("link set eth0 down")?;
    inside.namespace.ip("route add default via 172.31.0.2")?;
    let rules = "add table ip nat; \
         add chain ip nat post { type nat hook postrouting priority 100; }; \
         add rule ip nat post oifname eth0 masquerade random";
    router.exec(&["nft", rules])?;
    for setting in [
        "net.ipv4.ip_forward=1",
        "net.netfilter.nf_conntrack_udp_timeout=1",
        "net.netfilter.nf_conntrack_udp_timeout_stream=1",
    ] {
        router.exec(&["sysctl", "-qw", setting])?;
    }
    inside.peer(far, false)?;
    far.set_device()?;
    let [v4, v6] = inside.prefixes();
    // Where the node inside is, the other has to learn.
    far.must_set(&format!(
        "{}allowed_ip={v4}\nallowed_ip={v6}\n",
        peer_line(&inside.key)
    ))?;
    ping(inside, far.inner_v4(), 56)?;
    udp_echo(far, inside, inside.inner_v4(), 100)?;
    let first = endpoint_of(far, inside)?.context("no endpoint")?;
    ensure!(first.starts_with("192.0.2.3:"), "{first}");
    // The translation is forgotten: what comes from outside finds nobody, until the node inside speaks, from another port.
    std::thread::sleep(Duration::from_millis(1_500));
    let flow = Flow::start(far, inside, inside.inner_v4(), 100, 100)?;
    until("datagrams into nothing", || Ok(flow.sent() >= 20))?;
    let figures = flow.finish()?;
    ensure!(
        figures.lost == figures.sent,
        "the translation is still there: {figures:?}"
    );
    ping(inside, far.inner_v4(), 56)?;
    udp_echo(far, inside, inside.inner_v6(), 100)?;
    let second = endpoint_of(far, inside)?.context("no endpoint")?;
    ensure!(first != second, "{first}");
    // With keepalives it is not forgotten.
    router.exec(&["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=2"])?;
    router.exec(&["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout_stream=2"])?;
    inside.must_set(&format!(
        "{}persistent_keepalive_interval=1\n",
        peer_line(&far.key)
    ))?;
    ping(inside, far.inner_v4(), 56)?;
    let kept = endpoint_of(far, inside)?;
    std::thread::sleep(Duration::from_secs(3));
    ping(far, inside.inner_v4(), 56)?;
    ensure!(endpoint_of(far, inside)? == kept);
    Ok(())
}

/// The device is moved to another network namespace: its sockets stay where they were made.
pub(super) fn another_namespace(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    lab.mesh(false)?;
    ping(a, b.inner_v4(), 56)?;
    let inside = lab.namespace("x")?;
    a.namespace
        .ip(&format!("link set {} netns {}", a.device, inside.name()))?;
    inside.ip(&format!("link set {} name moved0", a.device))?;
    inside.ip("addr add 10.1.0.1/8 dev moved0")?;
    inside.ip("addr add fd00:1::1/16 dev moved0 nodad")?;
    inside.ip("link set moved0 up")?;
    // One answer is enough: right after a change wireguard-go may lose some.
    let three = ["-c", "3", "-i", "0.1", "-W", "5"];
    let ping_from_there = |arguments: &[&str]| {
        let ping = ["netns", "exec", inside.name(), "ping"];
        support::run("ip", ping.iter().chain(&three).chain(arguments))
    };
    for (theirs, ours) in [(b.inner_v4(), a.inner_v4()), (b.inner_v6(), a.inner_v6())] {
        ping_from_there(&[&theirs.to_string()])?;
        // Its answers find the device as well.
        ping(b, ours, 56)?;
    }
    // The namespace that it came from has nothing of it but the sockets.
    ensure!(!a.has_device());
    // Its MTU is still followed.
    inside.ip("link set moved0 mtu 1283")?;
    if a.is_ours() {
        a.control("stats warren0")?;
    }
    let capture = Capture::start(&lab)?;
    ping_from_there(&["-M", "do", "-s", "1253", "10.2.0.1"])?;
    let seen = capture.finish()?;
    ensure!(seen.largest == 1283 + 32, "{seen:?}");
    if matches!(a.engine, Engine::Kernel) {
        // Who configures it has to be there as well.
        return Ok(());
    }
    a.must_set(&format!("{}endpoint={}\n", peer_line(&b.key), b.outer(true)))?;
    ping_from_there(&["10.2.0.1"]).map(drop)
}
