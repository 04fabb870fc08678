//! The machine, looked at.

use std::collections::BTreeMap;

use warren_model::NodeName;

use super::{
    Machine,
    flight::{Flight, Members, Phase},
    status::{Counts, Outcome, Planned, Reported, Standing},
};

impl Machine {
    /// How far a rotation is.
    pub fn standing(&self, name: &str) -> Option<Standing<'_>> {
        let progress = &self.rotations.get(name)?.progress;
        let mut counts = Counts::default();
        let mut nodes = Vec::with_capacity(progress.plan.len());
        for (node, planned) in &progress.plan {
            let phase = phase_of(node, planned, &self.members, &self.flights);
            counts.add(phase);
            let waiting_for = self
                .flights
                .get(node)
                .and_then(|flight| flight.waiting_for.as_ref());
            nodes.push((node, phase, waiting_for.filter(|_| phase != Phase::Failed)));
        }
        Some(Standing {
            progress,
            counts,
            nodes,
        })
    }

    /// What an agent has said since it connected: the keys that it holds, and its paths to a peer.
    pub fn reported(&self, node: &NodeName) -> Option<Reported<'_>> {
        let member = self.members.get(node).filter(|member| member.connected)?;
        Some(Reported { member })
    }

    /// The phase of a node that is on its way.
    pub fn phase(&self, node: &NodeName) -> Option<Phase> {
        let flight = self.flights.get(node)?;
        Some(flight.phase(&self.members.get(node)?.keys))
    }

    /// The peer that a node on its way waits for.
    pub fn waiting_for(&self, node: &NodeName) -> Option<&NodeName> {
        self.flights.get(node)?.waiting_for.as_ref()
    }

    /// Nodes on their way, with the peer that each waits for.
    pub fn flying(&self) -> impl Iterator<Item = (&NodeName, Option<&NodeName>)> {
        self.flights
            .iter()
            .map(|(node, flight)| (node, flight.waiting_for.as_ref()))
    }
}

fn phase_of(
    node: &NodeName,
    planned: &Planned,
    members: &Members,
    flights: &BTreeMap<NodeName, Flight>,
) -> Phase {
    match (&planned.outcome, members.get(node)) {
        (Some(Outcome::Gone), _) | (_, None) => Phase::Gone,
        (Some(_), _) => Phase::Failed,
        (None, Some(member)) => match flights.get(node) {
            Some(flight) => flight.phase(&member.keys),
            None if member.keys.active > planned.from => Phase::Done,
            None => Phase::Pending,
        },
    }
}
