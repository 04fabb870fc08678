//! What several scenarios have in common.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    app::{ask::Protocol, wire::FlowReport},
    capture::Counts,
    lab::{Lab, LabOptions, Node, Pod, PodSpec, wait::wait_until},
};

/// How long a scenario waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A lab of two nodes: the least in which a leak is possible.
pub fn two_nodes(encryption: bool) -> LabOptions {
    LabOptions {
        nodes: 2,
        encryption,
        ..LabOptions::default()
    }
}

/// A pod on each of the first two nodes, which talk to each other in both families.
pub fn client_and_server(lab: &Lab) -> Result<(Pod, Pod)> {
    let client = lab.add_pod(PodSpec::new("client", 1))?;
    let server = lab.add_pod(PodSpec::new("server", 2))?;
    answers(&client, &server)?;
    Ok((client, server))
}

/// `to` answers `from` by its own name: both families, TCP, UDP and ICMP.
pub fn answers(from: &Pod, to: &Pod) -> Result<()> {
    for address in to.addresses() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            answers_as(from, protocol, *address, 64, to.name())?;
        }
        let report = from.ping(*address, 3, 56)?;
        ensure!(report.received == 3, "{} -> {address}: {report:?}", from.name());
    }
    Ok(())
}

/// One question, answered by the pod of that name and nobody else.
pub fn answers_as(from: &Pod, protocol: Protocol, to: IpAddr, size: usize, name: &str) -> Result<()> {
    let answer = from
        .ask(protocol, to, size)
        .with_context(|| format!("{} -> {name} {to}, {protocol:?}, {size} bytes", from.name()))?;
    ensure!(
        answer.name == name,
        "{} asked {name} at {to} and {} answered",
        from.name(),
        answer.name
    );
    Ok(())
}

/// Waits until `to` answers `from` in both families.
pub fn wait_answers(from: &Pod, to: &Pod) -> Result<()> {
    wait_until(
        PATIENCE,
        &format!("{} answers {}", to.name(), from.name()),
        || answers(from, to),
    )
}

/// A flow in each family, IPv4 first.
#[derive(Debug)]
pub struct Flows(Vec<crate::lab::Flow>);

impl Flows {
    /// Starts 1,000 packets a second in each family, once the pods reach each other: before that the nodes' first
    /// handshake may still be to come, for which an engine keeps no more than a few packets.
    pub fn start(from: &Pod, to: &Pod) -> Result<Self> {
        wait_until(
            PATIENCE,
            &format!("{} answers {} by UDP", to.name(), from.name()),
            || {
                let mut addresses = to.addresses().iter();
                addresses.try_for_each(|address| answers_as(from, Protocol::Udp, *address, 64, to.name()))
            },
        )?;
        let flows = to.addresses().iter().map(|address| from.flow(*address, 1000));
        Ok(Self(flows.collect::<Result<_>>()?))
    }

    /// Ends them; none may have lost a packet, and each must have carried some.
    pub fn finish_without_loss(self) -> Result<()> {
        for (report, family) in self.finish()?.iter().zip(["IPv4", "IPv6"]) {
            ensure!(report.sent > 0 && report.lost == 0, "{family}: {report:?}");
        }
        Ok(())
    }

    /// Ends them.
    pub fn finish(mut self) -> Result<Vec<FlowReport>> {
        self.0.iter_mut().for_each(crate::lab::Flow::stop);
        self.0.into_iter().map(crate::lab::Flow::finish).collect()
    }
}

/// Sends 1,000 packets in each family from a pod to addresses whose pod may be gone, whatever becomes of them.
pub fn insist(from: &Pod, to: &[IpAddr]) -> Result<()> {
    let flows = to
        .iter()
        .map(|address| from.burst(*address, 1000, 1000))
        .collect::<Result<Vec<_>>>()?;
    for flow in flows {
        let report = flow.finish()?;
        ensure!(report.sent == 1000, "{report:?}");
    }
    Ok(())
}

/// Nothing crossed in clear.
pub fn nothing_in_clear(counts: &Counts) -> Result<()> {
    ensure!(
        counts.plaintext == 0,
        "{} packets in clear, among them {:#?}",
        counts.plaintext,
        counts.plaintext_samples
    );
    Ok(())
}

/// Drops on a node, compared with an earlier look.
#[derive(Debug)]
pub struct DropCounter {
    before: BTreeMap<String, u64>,
}

impl DropCounter {
    /// The counts now.
    pub fn start(node: &Node) -> Result<Self> {
        Ok(Self {
            before: node.drops()?,
        })
    }

    /// Waits until at least `least` packets more were dropped for any of `reasons`.
    pub fn wait_for(&self, node: &Node, reasons: &[&str], least: u64) -> Result<()> {
        wait_until(
            PATIENCE,
            &format!("{least} drops on {} for one of {reasons:?}", node.name),
            || {
                let now = node.drops()?;
                // A counter whose table was deleted starts again.
                let grown: BTreeMap<_, _> = now
                    .iter()
                    .map(|(reason, count)| {
                        (
                            reason.clone(),
                            count.saturating_sub(self.before.get(reason).copied().unwrap_or(0)),
                        )
                    })
                    .filter(|(_, count)| *count > 0)
                    .collect();
                let sum: u64 = grown
                    .iter()
                    .filter(|(reason, _)| reasons.contains(&reason.as_str()))
                    .map(|(_, count)| count)
                    .sum();
                ensure!(sum >= least, "the counts grew by {grown:?}");
                Ok(())
            },
        )
    }
}

/// Address and port.
pub fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}
