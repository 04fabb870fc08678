//! Connection tracking from the agent's side: what is tracked, and what is over.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use warren_abi::{
    FLOW_AUDIT, FLOW_EGRESS, FLOW_FIN_LOCAL, FLOW_FIN_REMOTE, FLOW_JUDGED, FLOW_REPLY, FLOW_RESET, FlowKey,
    FlowState, FlowValue, MASQUERADED, MAX_ENDPOINT_INDEX,
};

use crate::{
    Config, Datapath, Error, PolicyDirection,
    maps::{Plain, Table, address},
    monotonic_time,
};

/// A tracked flow, as one endpoint sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Index of the endpoint, 0 = the host.
    pub endpoint: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Who opened it: ingress = the peer.
    pub direction: PolicyDirection,
    /// The endpoint's address and port as its packets show them (ICMP: identifier of the echo).
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// Identity of the peer when it was judged.
    pub peer: u32,
    /// Rule that allowed it, 0 where none had to.
    pub rule: u32,
    /// State.
    pub state: FlowPhase,
    /// Policy denies it; audit mode lets it pass.
    pub audited: bool,
    /// Policy revision that it was judged under.
    pub revision: u32,
    /// First packet, since the start of the monotonic clock.
    pub created: Duration,
    /// Last packet, since the start of the monotonic clock.
    pub last_seen: Duration,
    /// After this long without a packet it is over.
    pub lifetime: Duration,
}

/// How long new maps take up connections that are older than they are.
const ADOPTION: Duration = Duration::from_secs(60);
/// UDP's protocol number.
const UDP: u8 = 17;
/// The port of name servers.
const DNS: u16 = 53;
/// How long a question about a name is kept, in seconds: longer than its client waits.
const NAMES: u32 = 10;
/// Most flows of an endpoint until [`Datapath::set_flow_limit`].
const DEFAULT_LIMIT: u32 = 16_384;

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowPhase {
    /// Not judged on this tuple: it waits to be judged on its final address, and lets replies from a service in.
    Untranslated,
    /// No reply yet.
    New,
    /// Packets went both ways.
    Established,
    /// FIN or RST was seen.
    Closing,
}

impl FlowPhase {
    /// Name in kebab-case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Untranslated => "untranslated",
            Self::New => "new",
            Self::Established => "established",
            Self::Closing => "closing",
        }
    }
}

/// What a collection found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// Flows that have seen a reply.
    pub established: u32,
    /// Flows that have not.
    pub new: u32,
    /// Flows that were over and are removed.
    pub removed: u32,
    /// Flows that are left, by endpoint; those without are not listed.
    pub by_endpoint: BTreeMap<u16, u32>,
}

impl Datapath {
    /// What holds for flows before the agent says anything else; what was said before stays.
    pub(crate) fn set_flow_state(&mut self, config: &Config) -> Result<(), Error> {
        let range = |(first, last): (u16, u16)| u32::from(first) << 16 | u32::from(last);
        let before = self.maps.flows.state.get()?;
        let mut state = FlowState {
            node_ports: range(config.node_ports),
            wireguard_ports: range(config.wireguard_ports),
            ..before
        };
        if state.limit == 0 {
            state.limit = DEFAULT_LIMIT;
        }
        if state.revision == 0 {
            state.revision = 1;
            state.adopt_until = seconds(monotonic_time() + ADOPTION);
        }
        if state == before {
            return Ok(());
        }
        self.maps.flows.state.set(state)
    }

    /// Makes every flow be judged again by its next packet: to be called after every change of policy maps, of owners'
    /// or endpoints' identities. Returns the new revision, which is never 0.
    pub fn raise_revision(&mut self) -> Result<u32, Error> {
        let state = self.maps.flows.state.get()?;
        let revision = state.revision.checked_add(1).unwrap_or(1);
        self.maps.flows.state.set(FlowState { revision, ..state })?;
        Ok(revision)
    }

    /// The revision of policy that new flows are judged under.
    pub fn revision(&self) -> Result<u32, Error> {
        Ok(self.maps.flows.state.get()?.revision)
    }

    /// Sets how many flows an endpoint may have.
    pub fn set_flow_limit(&mut self, limit: u32) -> Result<(), Error> {
        let state = self.maps.flows.state.get()?;
        if state.limit == limit {
            return Ok(());
        }
        self.maps.flows.state.set(FlowState { limit, ..state })
    }

    /// Flows, of one endpoint or of all; at most `limit` of them, in no order. The notes of masqueraded ones, which are
    /// nobody's, are left out.
    pub fn flows(&self, endpoint: Option<u16>, limit: usize) -> Result<Vec<Flow>, Error> {
        let mut found = Vec::new();
        for map in [&self.maps.flows.established, &self.maps.flows.new] {
            map.chunks(|keys, values| {
                for (Plain(key), value) in keys.iter().zip(values) {
                    let wanted =
                        key.endpoint != MASQUERADED && endpoint.is_none_or(|own| key.endpoint == own);
                    if wanted && found.len() < limit {
                        found.push(flow(key, value));
                    }
                }
                Ok(found.len() < limit)
            })?;
        }
        Ok(found)
    }

    /// Removes flows that are over, counts those of each endpoint anew, and notes that somebody collects: endpoints are
    /// held to their limit only while this is recent, so call it every few seconds. `now` is that of
    /// [`monotonic_time`].
    ///
    /// A packet of a flow that is over, and comes at this very moment, may be judged as the first of a new one; so it is a
    /// moment later.
    pub fn collect_flows(&mut self, now: Duration) -> Result<FlowReport, Error> {
        let now = seconds(now);
        let mut report = FlowReport::default();
        let mut counts = vec![0_u32; usize::from(MAX_ENDPOINT_INDEX) + 1];
        let flows = &self.maps.flows;
        report.established = collect(&flows.established, now, &mut counts, &mut report.removed)?;
        report.new = collect(&flows.new, now, &mut counts, &mut report.removed)?;
        let before = flows.counts.all()?;
        for (index, (count, before)) in counts.iter().zip(before).enumerate() {
            if *count != before {
                self.maps.flows.counts.set(index as u32, *count)?;
            }
            if *count > 0 {
                report.by_endpoint.insert(index as u16, *count);
            }
        }
        let state = self.maps.flows.state.get()?;
        self.maps.flows.state.set(FlowState {
            collected: now,
            ..state
        })?;
        Ok(report)
    }

    /// Removes all flows of an endpoint: its index goes to another pod.
    pub fn forget_flows(&mut self, index: u16) -> Result<(), Error> {
        for map in [&self.maps.flows.established, &self.maps.flows.new] {
            map.chunks(|keys, _| {
                let own: Vec<_> = keys
                    .iter()
                    .filter(|Plain(key)| key.endpoint == index)
                    .copied()
                    .collect();
                map.remove_all(&own)?;
                Ok(true)
            })?;
        }
        self.maps.flows.counts.set(index.into(), 0)
    }
}

/// Removes what is over and adds the others to the counts; returns how many these are.
fn collect(
    map: &Table<Plain<FlowKey>, FlowValue>,
    now: u32,
    counts: &mut [u32],
    removed: &mut u32,
) -> Result<u32, Error> {
    let mut left = 0;
    map.chunks(|keys, values| {
        let mut over = Vec::new();
        for (key, value) in keys.iter().zip(values) {
            // A flow may have been seen after `now`.
            if now.saturating_sub(value.last_seen) > lifetime(&key.0, value) {
                over.push(*key);
            } else if let Some(count) = counts.get_mut(usize::from(key.0.endpoint)) {
                *count += 1;
                left += 1;
            }
        }
        *removed += over.len() as u32;
        map.remove_all(&over)?;
        Ok(true)
    })?;
    Ok(left)
}

/// Seconds that a flow is kept without a packet. Names are asked with one packet and answered with one, each time from
/// another port: as other flows, they would fill a name server's limit at a few hundred questions a second. RFC 4787
/// (REQ-5) leaves shorter times to ports below 1024.
fn lifetime(key: &FlowKey, value: &FlowValue) -> u32 {
    let names = key.protocol == UDP && [key.local_port, key.remote_port].contains(&DNS.to_be_bytes());
    if names {
        value.lifetime.min(NAMES)
    } else {
        value.lifetime
    }
}

fn seconds(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

fn flow(key: &FlowKey, value: &FlowValue) -> Flow {
    let has = |flag| value.flags & flag != 0;
    let of = |bytes, port| SocketAddr::new(address(bytes, key.family == 4), u16::from_be_bytes(port));
    let state = if !has(FLOW_JUDGED) {
        FlowPhase::Untranslated
    } else if has(FLOW_FIN_LOCAL) || has(FLOW_FIN_REMOTE) || has(FLOW_RESET) {
        FlowPhase::Closing
    } else if has(FLOW_REPLY) {
        FlowPhase::Established
    } else {
        FlowPhase::New
    };
    Flow {
        endpoint: key.endpoint,
        protocol: key.protocol,
        direction: if has(FLOW_EGRESS) {
            PolicyDirection::Egress
        } else {
            PolicyDirection::Ingress
        },
        local: of(key.local, key.local_port),
        remote: of(key.remote, key.remote_port),
        peer: value.peer,
        rule: value.rule,
        state,
        audited: has(FLOW_AUDIT),
        revision: value.revision,
        created: Duration::from_secs(value.created.into()),
        last_seen: Duration::from_secs(value.last_seen.into()),
        lifetime: Duration::from_secs(value.lifetime.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_about_names_are_kept_for_seconds() {
        let value = FlowValue {
            lifetime: 180,
            ..FlowValue::default()
        };
        let key = |protocol, local: u16, remote: u16| FlowKey {
            protocol,
            local_port: local.to_be_bytes(),
            remote_port: remote.to_be_bytes(),
            ..FlowKey::default()
        };
        assert_eq!(lifetime(&key(UDP, 53, 40_000), &value), 10, "at the server");
        assert_eq!(lifetime(&key(UDP, 40_000, 53), &value), 10, "at the client");
        assert_eq!(lifetime(&key(UDP, 40_000, 5300), &value), 180);
        assert_eq!(lifetime(&key(6, 40_000, 53), &value), 180, "TCP has an end");
    }
}
