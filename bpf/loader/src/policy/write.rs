//! Writes to the policy maps, and what they hold.

use ipnet::IpNet;

use super::{PolicyContents, PolicyEndpoint, PolicyPort, PolicyPortKey, PolicyVerdict, PolicyVerdictKey};
use crate::{Datapath, Error, convert::policy_index, sys};

impl Datapath {
    /// Gives an endpoint its policy: one map write, the next new flow is judged by it. Index 0 is the host.
    pub fn set_policy_endpoint(&mut self, index: u16, policy: PolicyEndpoint) -> Result<(), Error> {
        self.maps
            .policy
            .endpoints
            .set(policy_index(index)?, policy.value())
    }

    /// Closes an endpoint.
    pub fn remove_policy_endpoint(&mut self, index: u16) -> Result<(), Error> {
        self.maps.policy.endpoints.remove(index)
    }

    /// Sets the class of ports.
    pub fn set_policy_port(&mut self, key: PolicyPortKey, port: PolicyPort) -> Result<(), Error> {
        self.maps.policy.ports.set(key.key()?, port.value())
    }

    /// Removes ports; a shorter prefix may cover them still.
    pub fn remove_policy_port(&mut self, key: PolicyPortKey) -> Result<(), Error> {
        self.maps.policy.ports.remove(key.key()?)
    }

    /// Sets a verdict.
    pub fn set_policy_verdict(&mut self, key: PolicyVerdictKey, verdict: PolicyVerdict) -> Result<(), Error> {
        self.maps.policy.verdicts.set(key.key(), verdict.value())
    }

    /// Removes a verdict.
    pub fn remove_policy_verdict(&mut self, key: PolicyVerdictKey) -> Result<(), Error> {
        self.maps.policy.verdicts.remove(key.key())
    }

    /// Sets the number of a prefix in a table. Host bits are cut off.
    pub fn set_policy_cidr(&mut self, table: u32, prefix: IpNet, number: u32) -> Result<(), Error> {
        self.maps.policy.cidrs.set(table, prefix, number)
    }

    /// Removes a prefix from a table.
    pub fn remove_policy_cidr(&mut self, table: u32, prefix: IpNet) -> Result<(), Error> {
        self.maps.policy.cidrs.remove(table, prefix)
    }

    /// Everything that the policy maps hold. Entries that this version never writes are left out.
    pub fn policy_contents(&self) -> Result<PolicyContents, Error> {
        let maps = &self.maps.policy;
        let endpoints = maps.endpoints.entries()?.into_iter();
        let ports = maps.ports.entries()?.into_iter();
        let verdicts = maps.verdicts.entries()?.into_iter();
        Ok(PolicyContents {
            endpoints: endpoints
                .map(|(index, value)| (index, PolicyEndpoint::parse(value)))
                .collect(),
            ports: ports
                .filter_map(|(key, value)| Some((PolicyPortKey::parse(key)?, PolicyPort::parse(value))))
                .collect(),
            verdicts: verdicts
                .filter_map(|(key, value)| Some((PolicyVerdictKey::parse(key)?, PolicyVerdict::parse(value))))
                .collect(),
            cidrs: maps
                .cidrs
                .entries()?
                .into_iter()
                .map(|(table, prefix, number)| ((table, prefix), number))
                .collect(),
        })
    }

    /// Waits until every program that runs now has ended: none holds a number from before any more (an RCU grace
    /// period, some milliseconds).
    ///
    /// Fails where the kernel runs without timer ticks (`nohz_full`): then keep what was to be removed, or wait a
    /// second.
    pub fn policy_grace(&self) -> Result<(), Error> {
        sys::membarrier_global().map_err(|source| Error::Kernel {
            operation: "waiting for the programs that run (membarrier)".into(),
            source,
        })
    }
}
