//! The engine under `wg`, bad requests, and devices and engines that come and go.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use crate::support::{
    self, Engine, Lab, Node, PORT, peer_line, public,
    traffic::{Flow, ping, udp_echo},
    until,
};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

fn one() -> Result<Lab> {
    Lab::new([Engine::warren()])
}

fn wg(node: &Node, arguments: &[&str]) -> Result<String> {
    let output = node.exec(&[&["wg"], arguments].concat())?;
    Ok(String::from_utf8(output.stdout)?)
}

fn contains(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
    Ok(())
}

#[test]
fn wg_shows_and_sets() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    ping(a, b.inner_v4(), 56)?;
    let (own, other) = (public(&a.key).to_string(), public(&b.key).to_string());

    let shown = wg(a, &["show"])?;
    contains(
        &shown,
        &[
            "interface: warren0",
            &format!("public key: {own}"),
            "private key: (hidden)",
            &format!("listening port: {PORT}"),
            &format!("peer: {other}"),
            &format!("endpoint: [2001:db8::2]:{PORT}"),
            "allowed ips: 10.2.0.0/16, fd00:2::/32",
            "latest handshake: ",
            "transfer: ",
        ],
    )?;
    ensure!(wg(a, &["show", "interfaces"])?.trim() == "warren0");
    ensure!(wg(a, &["show", "warren0", "dump"])?.lines().count() == 2);

    wg(
        a,
        &[
            "set",
            "warren0",
            "fwmark",
            "0x10",
            "peer",
            &other,
            "persistent-keepalive",
            "25",
            "allowed-ips",
            "10.9.0.0/16",
        ],
    )?;
    let shown = wg(a, &["show", "warren0"])?;
    contains(
        &shown,
        &[
            "fwmark: 0x10",
            "persistent keepalive: every 25 seconds",
            "allowed ips: 10.9.0.0/16\n",
        ],
    )?;
    // The newer extension, which this `wg` does not know.
    a.must_set(&format!(
        "{}allowed_ip=10.8.0.0/16\nallowed_ip=-10.9.0.0/16\n",
        peer_line(&b.key)
    ))?;
    contains(&wg(a, &["show", "warren0"])?, &["allowed ips: 10.8.0.0/16\n"])?;
    wg(a, &["set", "warren0", "peer", &other, "remove"])?;
    ensure!(!wg(a, &["show", "warren0"])?.contains("peer:"));
    Ok(())
}

#[test]
fn wg_syncs_and_adds_configurations() -> Result<()> {
    let lab = one()?;
    let node = &lab.nodes[0];
    let (private, first, second) = (support::key(), public(&support::key()), public(&support::key()));
    let base64 = |bytes: &[u8; 32]| {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(bytes)
    };
    let dir = tempfile::tempdir()?;
    let write = |name: &str, text: String| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let interface = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51999\n",
        base64(private.expose())
    );
    let peer = |key, prefix| {
        format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {prefix}\nEndpoint = 192.0.2.77:51871\n")
    };
    let one = write("one", interface.clone() + &peer(first, "10.50.0.0/16"))?;
    wg(node, &["setconf", "warren0", &one])?;
    let add = write("add", peer(second, "10.51.0.0/16, fd00:51::/32"))?;
    wg(node, &["addconf", "warren0", &add])?;
    let shown = wg(node, &["show", "warren0"])?;
    contains(
        &shown,
        &[
            "listening port: 51999",
            "10.50.0.0/16",
            "10.51.0.0/16, fd00:51::/32",
        ],
    )?;
    let sync = write("sync", interface + &peer(second, "10.52.0.0/16"))?;
    wg(node, &["syncconf", "warren0", &sync])?;
    let shown = wg(node, &["showconf", "warren0"])?;
    contains(
        &shown,
        &[
            "ListenPort = 51999",
            &second.to_string(),
            "AllowedIPs = 10.52.0.0/16",
        ],
    )?;
    ensure!(
        !shown.contains(&first.to_string()) && !shown.contains("10.51"),
        "{shown}"
    );
    Ok(())
}

#[test]
fn a_bad_request_changes_nothing() -> Result<()> {
    let lab = one()?;
    let node = &lab.nodes[0];
    node.set_device()?;
    let other = support::key();
    node.must_set(&format!("{}allowed_ip=10.2.0.0/16\n", peer_line(&other)))?;
    let before = node.raw(b"get=1\n\n")?;
    let good = format!(
        "listen_port=51990\nreplace_peers=true\n{}allowed_ip=10.3.0.0/16\n",
        peer_line(&support::key())
    );
    for bad in [
        "nonsense",
        "allowed_ip=10.0.0.0/99",
        "endpoint=nowhere",
        "public_key=00",
        "remove=maybe",
    ] {
        ensure!(node.set(&format!("{good}{bad}\n"))? == -libc::EINVAL, "{bad}");
        ensure!(node.raw(b"get=1\n\n")? == before, "changed by {bad}");
    }
    for bytes in [
        &b"\xff\xfe\xfd\n\n"[..],
        b"get=1",
        b"set=1\nprivate_key=",
        b"\n\n\n",
        &[0; 5000],
    ] {
        let _ = node.raw(bytes);
    }
    let long = [b"set=1\n".as_slice(), &vec![b'x'; 20 << 20], b"\n\n"].concat();
    let _ = node.raw(&long);
    ensure!(node.raw(b"get=1\n\n")? == before);
    for request in [
        "",
        "nonsense",
        "attach",
        "attach a/b",
        "attach ..",
        "attach a-name-that-is-too-long",
        "stats nothing",
    ] {
        let answer = node.control(request)?;
        ensure!(answer["error"].is_string(), "{request:?}: {answer}");
    }
    Ok(())
}

#[test]
fn a_port_in_use_is_refused_and_the_old_one_stays() -> Result<()> {
    let lab = one()?;
    let node = &lab.nodes[0];
    node.set_device()?;
    let before = node.raw(b"get=1\n\n")?;
    let taken = support::traffic::join(support::traffic::within(node, || {
        Ok(std::net::UdpSocket::bind("[::]:51999")?)
    }))?;
    ensure!(node.set(&format!("listen_port=51999\n{}", peer_line(&support::key())))? == -libc::EADDRINUSE);
    ensure!(node.raw(b"get=1\n\n")? == before);
    drop(taken);
    for port in [51999, PORT, 51999] {
        node.must_set(&format!("listen_port={port}\n"))?;
        ensure!(node.get("listen_port")? == Some(port.to_string()));
    }
    node.must_set("listen_port=0\n")?;
    ensure!(
        node.get("listen_port")?
            .is_some_and(|port| port != "0" && port != "51999")
    );
    Ok(())
}

#[test]
fn without_a_private_key_nothing_is_sent() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    ping(a, b.inner_v4(), 56)?;
    a.must_set(&format!("private_key={}\n", "0".repeat(64)))?;
    ensure!(a.get("private_key")?.is_none());
    let sent = a.get("tx_bytes")?;
    let flow = Flow::start(a, b, b.inner_v4(), 500, 100)?;
    until("packets die for want of a key", || Ok(a.drops("no-key")? >= 50))?;
    let figures = flow.finish()?;
    ensure!(figures.lost == figures.sent, "{figures:?}");
    ensure!(a.get("tx_bytes")? == sent);
    a.set_device()?;
    udp_echo(a, b, b.inner_v4(), 100)
}

#[test]
fn sockets_are_private_and_not_taken_from_elsewhere() -> Result<()> {
    let lab = one()?;
    let node = &lab.nodes[0];
    for name in ["warren0.sock", "warren-engine.control", "warren-engine.lock"] {
        let mode = fs::metadata(node.run_dir().join(name))?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "{name}: {mode:o}");
    }
    let Engine::Warren(program, _) = &node.engine else {
        unreachable!()
    };
    // In the namespace of the tests, not of the node: nothing there could be gone on with.
    let second = Command::new(program)
        .arg(node.run_dir())
        .arg("warren0")
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(
        !second.status.success() && said.contains("in another network namespace"),
        "{said}"
    );
    ensure!(node.control("list")?["devices"] == serde_json::json!(["warren0"]));
    Ok(())
}

#[test]
fn a_device_that_is_deleted_comes_back_empty_and_others_go_on() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    ping(a, b.inner_v4(), 56)?;
    // A second device of the same engine, of which the other node knows nothing.
    a.control("attach other0")?;
    let flow = Flow::start(a, b, b.inner_v4(), 500, 100)?;
    until("traffic", || Ok(flow.received() > 50))?;
    a.namespace.ip("link del other0")?;
    until("other0 is let go of", || {
        Ok(a.control("list")?["devices"] == serde_json::json!(["warren0"]))
    })?;
    let figures = flow.finish()?;
    ensure!(figures.lost == 0, "{figures:?}");

    a.namespace.ip("link del warren0")?;
    until("warren0 is let go of", || Ok(!a.socket().exists()))?;
    a.namespace.ip("tuntap add dev warren0 mode tun")?;
    until("warren0 is served again", || {
        Ok(a.socket().exists() && a.get("listen_port").is_ok())
    })?;
    ensure!(a.get("private_key")?.is_none() && a.get("public_key")?.is_none());
    a.configure_links()?;
    lab.mesh(false)?;
    ping(a, b.inner_v4(), 56)
}

#[test]
fn devices_are_attached_and_let_go_of_on_request() -> Result<()> {
    let lab = one()?;
    let node = &lab.nodes[0];
    node.set_device()?;
    ensure!(node.control("detach warren0")?["error"].is_null());
    ensure!(
        !node.socket().exists() && node.has_device(),
        "the TUN device stays"
    );
    // It is not attached again on the engine's own.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    ensure!(node.control("list")?["devices"] == serde_json::json!([]));
    for _ in 0..2 {
        ensure!(node.control("attach warren0")?["error"].is_null());
    }
    ensure!(node.get("private_key")?.is_none());
    node.set_device()?;
    // Created when absent, and there when the engine is gone.
    ensure!(node.control("attach made0")?["error"].is_null());
    node.control("detach made0")?;
    node.namespace.ip("link show made0")?;
    // Not a TUN device.
    node.namespace.ip("link add veth7 type veth peer name veth8")?;
    let answer = node.control("attach veth7")?;
    let error = answer["error"].as_str().context("veth7 was attached")?;
    ensure!(error.contains("no TUN device"), "{error}");
    Ok(())
}

#[test]
fn a_link_that_is_down_is_no_end() -> Result<()> {
    let lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(false)?;
    let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
    ping(a, b.inner_v4(), 56)?;
    let flow = Flow::start(a, b, b.inner_v4(), 500, 100)?;
    b.namespace.ip("link set warren0 down")?;
    until("packets find the link down", || Ok(b.drops("device-down")? >= 50))?;
    b.namespace.ip("link set warren0 up")?;
    let before = flow.received();
    until("traffic again", || Ok(flow.received() > before + 50))?;
    flow.finish().map(drop)
}

#[test]
fn an_engine_that_dies_leaves_its_device_and_a_new_one_takes_it() -> Result<()> {
    let mut lab = Lab::new([Engine::warren(), Engine::warren()])?;
    lab.mesh(true)?;
    let address = lab.nodes[1].inner_v4();
    ping(&lab.nodes[0], address, 56)?;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        lab.nodes[0].stop(signal)?;
        let node = &lab.nodes[0];
        ensure!(node.has_device(), "the device stays after {signal}");
        ensure!(
            node.socket().exists() == (signal == Signal::SIGKILL),
            "sockets after {signal}"
        );
        lab.nodes[0].start()?;
        let (a, b) = (&lab.nodes[0], &lab.nodes[1]);
        ensure!(a.get("public_key")?.is_none(), "an engine starts empty");
        a.peer(b, true)?;
        // The other end still has a session with the dead one: a keepalive interval begins a new handshake at once.
        a.must_set(&format!(
            "{}persistent_keepalive_interval=25\n",
            peer_line(&b.key)
        ))?;
        udp_echo(b, a, a.inner_v4(), 100)?;
        udp_echo(a, b, b.inner_v6(), 100)?;
    }
    Ok(())
}
