//! The kernel's devices in the words of the configuration protocol: requests become calls of `wg`, and what `wg` shows
//! becomes an answer.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::Node;

fn base64_of(hex: &str) -> Result<String> {
    Ok(STANDARD.encode(hex::decode(hex)?))
}

fn hex_of(base64: &str) -> Result<String> {
    Ok(hex::encode(STANDARD.decode(base64)?))
}

/// One peer's part of a request.
#[derive(Default)]
struct Peer {
    key: String,
    lines: String,
    allowed: Vec<String>,
    replace: bool,
    remove: bool,
}

/// Does what `set=1` with these lines asks for.
pub(super) fn set(node: &Node, lines: &str) -> Result<()> {
    let (mut interface, mut peers) = ("[Interface]\n".to_owned(), Vec::<Peer>::new());
    for line in lines.lines() {
        let (key, value) = line.split_once('=').context("no value")?;
        let Some(peer) = peers.last_mut().filter(|_| key != "public_key") else {
            match key {
                "private_key" => writeln!(interface, "PrivateKey = {}", base64_of(value)?)?,
                "listen_port" => writeln!(interface, "ListenPort = {value}")?,
                "fwmark" => writeln!(interface, "FwMark = {value}")?,
                "public_key" => peers.push(Peer {
                    key: base64_of(value)?,
                    ..Peer::default()
                }),
                _ => anyhow::bail!("{key} is not of a device"),
            }
            continue;
        };
        match key {
            "endpoint" => writeln!(peer.lines, "Endpoint = {value}")?,
            "preshared_key" => writeln!(peer.lines, "PresharedKey = {}", base64_of(value)?)?,
            "persistent_keepalive_interval" => writeln!(peer.lines, "PersistentKeepalive = {value}")?,
            "allowed_ip" => peer.allowed.push(value.to_owned()),
            "replace_allowed_ips" => peer.replace = true,
            "remove" => peer.remove = true,
            "update_only" => {}
            _ => anyhow::bail!("{key} is not of a peer"),
        }
    }
    for peer in &peers {
        if peer.remove {
            node.exec(&["wg", "set", &node.device, "peer", &peer.key, "remove"])?;
        }
    }
    // `wg addconf` replaces what a peer it names has.
    let present = match peers.iter().all(|peer| peer.replace || peer.remove) {
        true => Vec::new(),
        false => allowed_ips(node)?,
    };
    let mut text = interface;
    for peer in peers.iter_mut().filter(|peer| !peer.remove) {
        let kept = present
            .iter()
            .filter(|(key, _)| *key == peer.key && !peer.replace);
        peer.allowed.extend(kept.map(|(_, prefix)| prefix.clone()));
        writeln!(text, "[Peer]\nPublicKey = {}\n{}", peer.key, peer.lines)?;
        if !peer.allowed.is_empty() {
            writeln!(text, "AllowedIPs = {}", peer.allowed.join(", "))?;
        }
    }
    add(node, &text)
}

fn add(node: &Node, text: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["netns", "exec", node.namespace.name(), "wg", "addconf"])
        .args([&node.device, "/dev/stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "wg addconf: {said}");
    Ok(())
}

/// Keys of peers and what each may send from, a pair for each prefix.
fn allowed_ips(node: &Node) -> Result<Vec<(String, String)>> {
    let output = node.exec(&["wg", "show", &node.device, "allowed-ips"])?;
    let text = String::from_utf8(output.stdout)?;
    let pairs = text.lines().filter_map(|line| line.split_once('\t'));
    let each = pairs.flat_map(|(key, prefixes)| {
        let prefixes = prefixes.split(' ').filter(|prefix| *prefix != "(none)");
        prefixes.map(move |prefix| (key.to_owned(), prefix.to_owned()))
    });
    Ok(each.collect())
}

/// What `get=1` would be answered with.
pub(super) fn get(node: &Node) -> Result<String> {
    let output = node.exec(&["wg", "show", &node.device, "dump"])?;
    let text = String::from_utf8(output.stdout)?;
    let mut answer = String::new();
    for (number, line) in text.lines().enumerate() {
        let fields: Vec<&str> = line.split('\t').collect();
        match (number, &fields[..]) {
            (0, [private, _, port, _]) => {
                if *private != "(none)" {
                    writeln!(answer, "private_key={}", hex_of(private)?)?;
                }
                writeln!(answer, "listen_port={port}")?;
            }
            (_, [key, _, endpoint, allowed, handshake, received, sent, _]) => {
                writeln!(answer, "public_key={}", hex_of(key)?)?;
                if *endpoint != "(none)" {
                    writeln!(answer, "endpoint={endpoint}")?;
                }
                for prefix in allowed.split(',').filter(|prefix| *prefix != "(none)") {
                    writeln!(answer, "allowed_ip={prefix}")?;
                }
                writeln!(answer, "last_handshake_time_sec={handshake}")?;
                writeln!(answer, "rx_bytes={received}\ntx_bytes={sent}")?;
            }
            _ => anyhow::bail!("wg said: {line}"),
        }
    }
    Ok(answer + "errno=0\n\n")
}
