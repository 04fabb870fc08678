//! Keys that change, and keys that are none.

use std::net::UdpSocket;

use anyhow::{Result, ensure};
use blake2::{
    Blake2s256, Blake2sMac, Digest as _,
    digest::{FixedOutput as _, Mac as _, consts::U16},
};

use crate::support::{
    self, Engine, Lab, Node, PORT,
    capture::Capture,
    peer_line, public,
    traffic::{Flow, join, ping, udp_echo, within},
    until,
};

/// A node gets another private key; nothing else of it changes.
pub(super) fn private_key(engines: [Engine; 2]) -> Result<()> {
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
    // The key that a device has already changes nothing: its sessions live on.
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    let flow = Flow::start(a, b, b.inner_v4(), 200, 100)?;
    until("traffic", || Ok(flow.received() > 20))?;
    a.set_device()?;
    let arrived = flow.received();
    until("traffic goes on", || Ok(flow.received() > arrived + 20))?;
    let figures = flow.finish()?;
    ensure!(figures.lost == 0, "{figures:?}");
    // A device is no peer of itself.
    a.must_set(&format!("private_key={}\n", hex::encode(b.key.expose())))?;
    ensure!(!a.shown()?.contains(peer_line(&b.key).trim()));
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
pub(super) fn low_order_keys(engines: [Engine; 2]) -> Result<()> {
    let lab = Lab::new(engines)?;
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
    if a.is_ours() {
        until("they are refused", || {
            Ok(a.drops("handshake-refused")? + a.drops("malformed")? >= 7)
        })?;
    }
    // An answer that is late is one after this.
    udp_alone(attacker, a)?;
    let seen = capture.finish()?;
    ensure!(seen.tunnel >= 7 && seen.largest == 0, "{seen:?}");
    ensure!(a.get_all("tx_bytes")?.iter().all(|bytes| bytes == "0"));
    Ok(())
}

/// A datagram and its answer outside of the tunnel.
fn udp_alone(from: &Node, to: &Node) -> Result<()> {
    udp_echo(
        from,
        to,
        std::net::Ipv4Addr::new(192, 0, 2, to.number).into(),
        100,
    )
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
