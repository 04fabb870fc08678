//! Who may send from which address.

use anyhow::{Result, ensure};

use crate::support::{
    self, Engine, Lab, Node, peer_line,
    traffic::{Flow, ping, udp_echo},
    until,
};

/// Sends 50 datagrams from `source`, an address that `from` gives itself. How many arrived.
fn spoof(from: &Node, source: &str, to: &Node) -> Result<u64> {
    let length = if source.contains(':') { 128 } else { 32 };
    // One address stays and is used again.
    let _ = from
        .namespace
        .ip(&format!("addr add {source}/{length} dev {} nodad", from.device));
    let address = if source.contains(':') {
        to.inner_v6()
    } else {
        to.inner_v4()
    };
    let flow = Flow::start_from(from, Some(source.parse()?), to, address, 500, 100)?;
    until("50 datagrams were sent", || Ok(flow.sent() >= 50))?;
    let figures = flow.finish()?;
    ensure!(
        figures.lost == 0 || figures.lost == figures.sent,
        "some arrived: {figures:?}"
    );
    Ok(figures.sent - figures.lost)
}

/// Node 1 hears node 2, which owns 10.0.0.0/8, and node 3, which owns 10.3.0.0/16: only the most specific owner may send
/// from an address.
pub(super) fn overlapping_prefixes(engines: [Engine; 2]) -> Result<()> {
    let [receiver, senders] = engines;
    let lab = Lab::new([receiver, senders.clone(), senders])?;
    lab.mesh(false)?;
    let [receiver, wide, narrow] = &lab.nodes[..] else {
        unreachable!()
    };
    receiver.must_set(&format!(
        "{}allowed_ip=10.0.0.0/8\nallowed_ip=fd00::/16\n",
        peer_line(&wide.key)
    ))?;
    for address in [receiver.inner_v4(), receiver.inner_v6()] {
        ping(wide, address, 56)?;
        ping(narrow, address, 56)?;
    }
    // Only our engine counts.
    let refused = || match receiver.is_ours() {
        true => receiver.drops("source-not-owned"),
        false => Ok(0),
    };
    let more = if receiver.is_ours() { 50 } else { 0 };
    ensure!(refused()? == 0);

    for source in ["10.77.0.1", "fd00:77::1"] {
        ensure!(spoof(wide, source, receiver)? > 0, "inside its own wide prefix");
    }
    for (count, source) in [(1, "10.3.0.99"), (2, "fd00:3::99")] {
        ensure!(spoof(wide, source, receiver)? == 0, "{source} belongs to node 3");
        ensure!(refused()? >= count * more, "{} drops were counted", refused()?);
    }
    // Nobody owns this one.
    let before = refused()?;
    ensure!(spoof(narrow, "10.3.0.98", receiver)? > 0);
    let [v4, v6] = wide.prefixes();
    receiver.must_set(&format!(
        "{}update_only=true\nreplace_allowed_ips=true\nallowed_ip={v4}\nallowed_ip={v6}\n",
        peer_line(&wide.key)
    ))?;
    ensure!(spoof(wide, "10.77.0.1", receiver)? == 0);
    ensure!(refused()? >= before + more);

    // The prefix moves: now it is the other way round.
    receiver.must_set(&format!("{}allowed_ip=10.3.0.0/16\n", peer_line(&wide.key)))?;
    ensure!(spoof(wide, "10.3.0.99", receiver)? > 0);
    ensure!(spoof(narrow, "10.3.0.98", receiver)? == 0);
    Ok(())
}

/// As many as the kernel's test has, in one request; each is where it should be, through a handover as well.
pub(super) fn many_prefixes(engines: [Engine; 2]) -> Result<()> {
    let mut lab = Lab::new(engines)?;
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
    if lab.nodes[0].is_ours() {
        ensure!(lab.nodes[0].succeed(&[])?.wait()?.success());
    }
    let [a, b] = &lab.nodes[..] else { unreachable!() };
    ensure!(a.get_all("allowed_ip")?.len() == 131_072 + 2);
    udp_echo(a, b, "10.128.7.7".parse()?, 100)?;
    a.must_set(&format!("{}remove=true\n", peer_line(&other)))?;
    ensure!(a.get_all("allowed_ip")?.len() == 3);
    let figures = flow.finish()?;
    // What cannot be taken out of boringtun's sessions is made anew, and needs a moment.
    ensure!(figures.lost == 0 || a.is_boringtun(), "{figures:?}");
    Ok(())
}
