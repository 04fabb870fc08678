//! The parts of Warren and how they are: a pure judgement, for `warren status`.

use serde::Serialize;
use warren_keyd_api::status::ClusterStatus;

/// A workload of Warren's in Kubernetes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Component {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) desired: u32,
    pub(crate) updated: u32,
    pub(crate) ready: u32,
    pub(crate) available: u32,
    /// The controller has seen the newest specification: the numbers are about it.
    #[serde(skip)]
    pub(crate) observed: bool,
    pub(crate) images: Vec<String>,
    pub(crate) problems: Vec<String>,
}

impl Component {
    /// Everything wanted is there and nothing complains.
    pub(crate) fn ok(&self) -> bool {
        self.observed
            && [self.updated, self.ready, self.available]
                .iter()
                .all(|number| *number >= self.desired)
            && self.problems.is_empty()
    }
}

/// The agents and keyd, as keyd sees them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mesh {
    /// Of keyd's version.
    pub(crate) keyd_version: String,
    /// Where the leader is reached.
    pub(crate) leader: String,
    /// Nodes that keyd knows.
    pub(crate) nodes: usize,
    /// Agents with a stream to keyd.
    pub(crate) connected: usize,
    /// Agents that have applied the newest directory.
    pub(crate) up_to_date: usize,
    /// Pods that the agents manage.
    pub(crate) pods: u32,
    /// Different versions of agents.
    pub(crate) agent_versions: Vec<String>,
}

/// What `warren status` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) healthy: bool,
    /// Empty without Kubernetes.
    pub(crate) components: Vec<Component>,
    /// `None` where keyd cannot be asked.
    pub(crate) mesh: Option<Mesh>,
    /// A sentence each.
    pub(crate) problems: Vec<String>,
}

/// Judges the workloads, and what keyd said or why it could not be asked.
pub(crate) fn judge(components: Vec<Component>, status: Result<&ClusterStatus, String>) -> Report {
    let mut problems = Vec::new();
    for component in &components {
        if !component.ok() && component.problems.is_empty() {
            problems.push(format!("{}: {}", component.name, shortage(component)));
        }
        problems.extend(
            component
                .problems
                .iter()
                .map(|problem| format!("{}: {problem}", component.name)),
        );
    }
    let mesh = match status {
        Ok(status) => {
            problems.extend(mesh_problems(status));
            Some(mesh(status))
        }
        Err(error) => {
            problems.push(format!("keyd cannot be asked: {error}"));
            None
        }
    };
    Report {
        healthy: problems.is_empty(),
        components,
        mesh,
        problems,
    }
}

fn shortage(component: &Component) -> String {
    if !component.observed {
        return "a change has just been made".into();
    }
    let numbers = [
        (component.updated, "updated"),
        (component.ready, "ready"),
        (component.available, "available"),
    ];
    let short = numbers
        .into_iter()
        .find(|(number, _)| *number < component.desired);
    short.map_or_else(String::new, |(number, what)| {
        format!("{number} of {} {what}", component.desired)
    })
}

fn mesh_problems(status: &ClusterStatus) -> Vec<String> {
    let mut problems = Vec::new();
    if !status.leader {
        problems.push("no keyd that leads answered".into());
    } else if status.nodes.is_empty() {
        problems.push("keyd knows no node".into());
    }
    problems.extend(status.problems.iter().map(|problem| format!("keyd: {problem}")));
    for node in &status.nodes {
        let reported = node.agent.as_ref().map(|agent| agent.problems.as_slice());
        match (node.connected, reported) {
            (false, _) => problems.push(format!("node {}: its agent is not connected to keyd", node.name)),
            (true, None) => problems.push(format!("node {}: its agent has not reported yet", node.name)),
            (true, Some(reported)) => {
                problems.extend(
                    reported
                        .iter()
                        .map(|problem| format!("node {}: {problem}", node.name)),
                );
            }
        }
    }
    problems
}

fn mesh(status: &ClusterStatus) -> Mesh {
    let reports = || status.nodes.iter().filter_map(|node| node.agent.as_ref());
    let newest = (status.epoch, status.directory_version);
    let mut agent_versions: Vec<String> = reports().map(|report| report.agent_version.clone()).collect();
    agent_versions.sort();
    agent_versions.dedup();
    Mesh {
        keyd_version: status.version.clone(),
        leader: status.leader_address.clone(),
        nodes: status.nodes.len(),
        connected: status.nodes.iter().filter(|node| node.connected).count(),
        up_to_date: status
            .nodes
            .iter()
            .filter(|node| (node.applied_epoch, node.applied_version) >= newest)
            .count(),
        pods: reports().map(|report| report.endpoints).sum(),
        agent_versions,
    }
}

#[cfg(test)]
mod tests {
    use warren_keyd_api::status::{AgentReport, NodeStatus};

    use super::*;

    fn component() -> Component {
        Component {
            name: "mesh-agent".into(),
            kind: "DaemonSet".into(),
            desired: 3,
            updated: 3,
            ready: 3,
            available: 3,
            observed: true,
            images: vec!["localhost/warren/mesh-agent:1".into()],
            problems: Vec::new(),
        }
    }

    fn status() -> ClusterStatus {
        let node = |name: &str| NodeStatus {
            name: name.into(),
            connected: true,
            applied_epoch: 5,
            applied_version: 2,
            agent: Some(AgentReport {
                endpoints: 4,
                agent_version: "1".into(),
                ..AgentReport::default()
            }),
            ..NodeStatus::default()
        };
        ClusterStatus {
            leader: true,
            epoch: 5,
            directory_version: 2,
            nodes: vec![node("a"), node("b")],
            ..ClusterStatus::default()
        }
    }

    #[test]
    fn all_is_well() {
        let report = judge(vec![component()], Ok(&status()));
        assert!(report.healthy, "{:?}", report.problems);
        let mesh = report.mesh.expect("asked");
        assert_eq!(
            (mesh.nodes, mesh.connected, mesh.up_to_date, mesh.pods),
            (2, 2, 2, 8)
        );
        assert_eq!(mesh.agent_versions, ["1"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let short = Component {
            ready: 2,
            available: 1,
            ..component()
        };
        let crashing = Component {
            ready: 2,
            problems: vec!["pod x: CrashLoopBackOff".into()],
            ..component()
        };
        let unseen = Component {
            observed: false,
            ..component()
        };
        let report = judge(vec![short, crashing, unseen], Err("no pod of keyd".into()));
        assert_eq!(
            report.problems,
            [
                "mesh-agent: 2 of 3 ready",
                "mesh-agent: pod x: CrashLoopBackOff",
                "mesh-agent: a change has just been made",
                "keyd cannot be asked: no pod of keyd",
            ]
        );
        assert!(!report.healthy && report.mesh.is_none());
    }

    #[test]
    fn agents_are_judged() {
        let mut status = status();
        status.nodes[0].connected = false;
        status.nodes[1].agent = None;
        status.nodes[1].applied_version = 1;
        let report = judge(Vec::new(), Ok(&status));
        assert_eq!(
            report.problems,
            [
                "node a: its agent is not connected to keyd",
                "node b: its agent has not reported yet"
            ]
        );
        assert_eq!(report.mesh.expect("asked").up_to_date, 1);
        status = ClusterStatus {
            problems: vec!["bad.yaml: malformed".into()],
            ..ClusterStatus::default()
        };
        assert_eq!(
            judge(Vec::new(), Ok(&status)).problems,
            ["no keyd that leads answered", "keyd: bad.yaml: malformed"]
        );
    }
}
