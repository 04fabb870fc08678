//! What the kernel's own tests of WireGuard put a tunnel through, between two of our engines and with wireguard-go.

mod support;

use std::{net::UdpSocket, time::Duration};

use anyhow::{Context as _, Result, ensure};
use blake2::{
    Blake2s256, Blake2sMac, Digest as _,
    digest::{FixedOutput as _, Mac as _, consts::U16},
};
use support::{
    Engine, Lab, Node, PORT,
    capture::Capture,
    peer_line, public,
    traffic::{Flow, join, ping, udp_echo, within},
    until,
};

/// What a node says of another.
fn endpoint_of(node: &Node, peer: &Node) -> Result<Option<String>> {
    let answer = node.raw(b"get=1\n\n")?;
    let key = peer_line(&peer.key);
    let lines = answer.split(key.trim()).nth(1).context("no such peer")?;
    let mut lines = lines.lines().take_while(|line| !line.starts_with("public_key="));
    Ok(lines.find_map(|line| line.strip_prefix("endpoint=").map(str::to_owned)))
}

/// Each end moves to another address, over both families, while the other sends.
fn roams(engines: [Engine; 2]) -> Result<()> {
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

#[test]
fn roaming() -> Result<()> {
    roams([Engine::warren(), Engine::warren()])
}

#[test]
fn roaming_with_wireguard_go() -> Result<()> {
    roams([Engine::warren(), Engine::WireguardGo])
}

/// A node gets another private key; nothing else of it changes.
fn changes_its_key(engines: [Engine; 2]) -> Result<()> {
    let mut lab = Lab::new(engines)?;
    lab.mesh(false)?;
    ping(&lab.nodes[0], lab.nodes[1].inner_v4(), 56)?;
    for changing in [0, 1, 0] {
        let former = peer_line(&lab.nodes[changing].key);
        lab.nodes[changing].key = support::key();
        let (node, other) = (&lab.nodes[changing], &lab.nodes[1 - changing]);
        node.set_device()?;
        // The former key is nobody now.
        other.must_set(&format!("{former}remove=true\n"))?;
        other.peer(node, false)?;
        for (from, to) in [(node, other), (other, node)] {
            udp_echo(from, to, to.inner_v4(), 500)?;
            udp_echo(from, to, to.inner_v6(), 1_200)?;
        }
    }
    Ok(())
}

#[test]
fn private_key_changes() -> Result<()> {
    changes_its_key([Engine::warren(), Engine::warren()])
}

#[test]
fn private_key_changes_with_wireguard_go() -> Result<()> {
    changes_its_key([Engine::warren(), Engine::WireguardGo])
}

/// Node 1 is behind node 3, which translates its address and forgets it after a second or two.
fn behind_nat(far: Engine) -> Result<()> {
    let lab = Lab::new([Engine::warren(), far, Engine::warren()])?;
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
    std::thread::sleep(Duration::from_secs(3));
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
    std::thread::sleep(Duration::from_secs(4));
    ping(far, inside.inner_v4(), 56)?;
    ensure!(endpoint_of(far, inside)? == kept);
    Ok(())
}

#[test]
fn nat_with_timeouts() -> Result<()> {
    behind_nat(Engine::warren())
}

#[test]
fn nat_with_timeouts_and_wireguard_go() -> Result<()> {
    behind_nat(Engine::WireguardGo)
}

/// What is padded never gets larger than the link may carry, also after that has changed.
#[test]
fn padding_respects_the_mtu() -> Result<()> {
    for other in [Engine::warren(), Engine::WireguardGo] {
        let lab = Lab::new([Engine::warren(), other])?;
        lab.mesh(false)?;
        let [a, b] = &lab.nodes[..] else { unreachable!() };
        ping(a, b.inner_v4(), 56)?;
        for mtu in [1412usize, 1283] {
            a.namespace.ip(&format!("link set {} mtu {mtu}", a.device))?;
            // Looks the MTU up.
            a.control("stats warren0")?;
            for size in [mtu, mtu - 1, 65, 84] {
                let capture = Capture::start(&lab)?;
                let (payload, address) = ((size - 28).to_string(), b.inner_v4().to_string());
                a.exec(&["ping", "-M", "do", "-c", "1", "-W", "5", "-s", &payload, &address])?;
                let seen = capture.finish()?;
                let padded = size.next_multiple_of(16).min(mtu);
                ensure!(seen.largest == padded + 32, "{size} bytes, MTU {mtu}: {seen:?}");
            }
            // Beyond the link's MTU the stack says so; nothing is sent.
            let large = mtu.to_string();
            let too_large = ["ping", "-M", "do", "-c", "1", "-W", "1", "-s", &large, "10.2.0.1"];
            ensure!(a.exec(&too_large).is_err());
        }
    }
    Ok(())
}

/// Points of small order (RFC 7748, section 6.1), the first bytes: the rest is zero but for the last two.
fn low_order() -> Vec<[u8; 32]> {
    let decode = |text: &str| -> [u8; 32] { hex::decode(text).unwrap().try_into().unwrap() };
    vec![
        [0; 32],
        decode("0100000000000000000000000000000000000000000000000000000000000000"),
        decode("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        decode("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        decode("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        decode("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        decode("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ]
}

/// Neither as a peer's key nor in a message does such a point make an engine say anything.
#[test]
fn keys_of_low_order_emit_nothing() -> Result<()> {
    for engine in [Engine::warren(), Engine::warren_boringtun()] {
        let lab = Lab::new([engine, Engine::warren()])?;
        let [a, attacker] = &lab.nodes[..] else {
            unreachable!()
        };
        a.set_device()?;
        let capture = Capture::start(&lab)?;
        for key in low_order() {
            // Refused, or never spoken to.
            a.set(&format!(
                "public_key={}\nendpoint=192.0.2.2:{PORT}\npersistent_keepalive_interval=1\nallowed_ip=10.2.0.0/16\n",
                hex::encode(key)
            ))?;
        }
        let sender = Flow::start(a, attacker, attacker.inner_v4(), 100, 100)?;
        until("packets for such a peer", || Ok(sender.sent() > 50))?;
        sender.finish()?;
        ensure!(capture.finish()?.tunnel == 0);

        let capture = Capture::start(&lab)?;
        let target = *public(&a.key).as_bytes();
        join(within(attacker, move || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            for key in low_order() {
                socket.send_to(&initiation_with(&key, &target), ("192.0.2.1", PORT))?;
            }
            Ok(())
        }))?;
        until("they are refused", || {
            Ok(a.drops("handshake-refused")? + a.drops("malformed")? >= 7)
        })?;
        // Those seven, and no answer.
        ensure!(capture.finish()?.packets >= 7);
        ensure!(a.get("tx_bytes")?.is_none_or(|bytes| bytes == "0"));
    }
    Ok(())
}

/// An initiation with this ephemeral key and a sound first authenticator.
fn initiation_with(ephemeral: &[u8; 32], target: &[u8; 32]) -> Vec<u8> {
    let mut message = vec![0; 148];
    message[0] = 1;
    message[8..40].copy_from_slice(ephemeral);
    let key = Blake2s256::new()
        .chain_update(b"mac1----")
        .chain_update(target)
        .finalize();
    let mut mac = Blake2sMac::<U16>::new_from_slice(&key).expect("a key of 32 bytes");
    mac.update(&message[..116]);
    message[116..132].copy_from_slice(&mac.finalize_fixed());
    message
}

/// As many as the kernel's test has, in one request; each is where it should be, through a handover as well.
#[test]
fn a_hundred_thousand_prefixes_and_more() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    ping(a, b.inner_v4(), 56)?;
    let other = support::key();
    let mut lines = peer_line(&other);
    for x in 0..256 {
        for y in 0..256 {
            lines += &format!("allowed_ip=10.128.{x}.{y}/32\nallowed_ip=fd00:80::{x:x}:{y:x}/128\n");
        }
    }
    let flow = Flow::start(b, a, a.inner_v4(), 500, 100)?;
    a.must_set(&lines)?;
    ensure!(a.get_all("allowed_ip")?.len() == 131_072 + 2);
    // The most specific one goes to somebody else.
    a.must_set(&format!("{}allowed_ip=10.128.7.7/32\n", peer_line(&b.key)))?;
    b.namespace
        .ip(&format!("addr add 10.128.7.7/32 dev {}", b.device))?;
    udp_echo(a, b, "10.128.7.7".parse()?, 100)?;
    ensure!(lab.nodes[0].succeed(&[])?.wait()?.success());
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    println!("{}", a.control("ping")?);
    ensure!(a.get_all("allowed_ip")?.len() == 131_072 + 2);
    udp_echo(a, b, "10.128.7.7".parse()?, 100)?;
    a.must_set(&format!("{}remove=true\n", peer_line(&other)))?;
    ensure!(a.get_all("allowed_ip")?.len() == 3);
    let figures = flow.finish()?;
    ensure!(figures.lost == 0, "{figures:?}");
    Ok(())
}
