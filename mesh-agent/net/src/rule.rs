//! Our routing rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteHeader, RouteProtocol},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{
    IpVersion,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage},
};

use crate::{Error, PROTOCOL};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A rule that sends packets to a routing table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Which family.
    pub family: Family,
    /// Smaller is looked at first.
    pub priority: u32,
    /// Source prefix; `None` for all.
    pub from: Option<IpNet>,
    /// Destination prefix; `None` for all.
    pub to: Option<IpNet>,
    /// The table to look up.
    pub table: u32,
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.priority)?;
        if let Some(from) = self.from {
            write!(f, "from {from} ")?;
        }
        if let Some(to) = self.to {
            write!(f, "to {to} ")?;
        }
        write!(f, "lookup {} ({:?})", self.table, self.family)
    }
}

/// What [`crate::Net::apply_rules`] did.
#[derive(Debug, Default)]
pub struct RuleChanges {
    /// Were missing.
    pub added: Vec<Rule>,
    /// Were surplus.
    pub removed: Vec<Rule>,
    /// Refused by the kernel, and why.
    pub failed: Vec<(Rule, Error)>,
}

impl RuleChanges {
    /// Nothing was to be done, and nothing failed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.failed.is_empty()
    }
}

pub(crate) async fn list(handle: &rtnetlink::Handle) -> Result<Vec<Rule>, Error> {
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut messages = Box::pin(handle.rule().get(version).execute());
        loop {
            match messages.try_next().await {
                Ok(Some(message)) => rules.extend(parse(&message)),
                Ok(None) => break,
                Err(error) => {
                    let error = Error::netlink("list the routing rules")(error);
                    if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) {
                        break;
                    }
                    return Err(error);
                }
            }
        }
    }
    Ok(rules)
}

pub(crate) async fn apply(handle: &rtnetlink::Handle, desired: &[Rule]) -> Result<RuleChanges, Error> {
    let present = list(handle).await?;
    let mut wanted: Vec<Rule> = desired.iter().map(normalised).collect();
    wanted.sort();
    wanted.dedup();
    let mut changes = RuleChanges::default();
    for rule in wanted.iter().filter(|rule| !present.contains(rule)) {
        match add(handle, rule).await {
            Ok(()) => changes.added.push(rule.clone()),
            Err(error) => changes.failed.push((rule.clone(), error)),
        }
    }
    for rule in present.into_iter().filter(|rule| !wanted.contains(rule)) {
        match delete(handle, &rule).await {
            Ok(()) => changes.removed.push(rule),
            Err(error) => changes.failed.push((rule, error)),
        }
    }
    Ok(changes)
}

fn normalised(rule: &Rule) -> Rule {
    let prefix = |net: Option<IpNet>| net.map(|net| net.trunc()).filter(|net| net.prefix_len() > 0);
    Rule {
        from: prefix(rule.from),
        to: prefix(rule.to),
        ..rule.clone()
    }
}

pub(crate) fn parse(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let (family, any) = match header.family {
        AddressFamily::Inet => (Family::V4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => (Family::V6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => return None,
    };
    if header.action != RuleAction::ToTable {
        return None;
    }
    let (mut ours, mut table, mut priority) = (false, u32::from(header.table), 0);
    let (mut from, mut to) = (any, any);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(protocol) => ours = *protocol == RouteProtocol::Other(PROTOCOL),
            RuleAttribute::Table(id) => table = *id,
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Source(address) => from = *address,
            RuleAttribute::Destination(address) => to = *address,
            _ => {}
        }
    }
    let prefix = |address, length: u8| {
        if length == 0 {
            None
        } else {
            IpNet::new(address, length).ok()
        }
    };
    ours.then(|| Rule {
        family,
        priority,
        from: prefix(from, header.src_len),
        to: prefix(to, header.dst_len),
        table,
    })
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match rule.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RuleAttribute::Table(rule.table));
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message
        .attributes
        .push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        message.attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        message.attributes.push(RuleAttribute::Destination(to.network()));
    }
    message
}

async fn add(handle: &rtnetlink::Handle, rule: &Rule) -> Result<(), Error> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRule(message(rule)));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let what = format!("add the routing rule {rule}");
    crate::request::acknowledged(handle, request, what).await
}

/// A rule that is gone already is no error.
async fn delete(handle: &rtnetlink::Handle, rule: &Rule) -> Result<(), Error> {
    match handle.rule().del(message(rule)).execute().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = Error::netlink(format!("delete the routing rule {rule}"))(error);
            match error.errno() {
                Some(libc::ENOENT) => Ok(()),
                _ => Err(error),
            }
        }
    }
}
