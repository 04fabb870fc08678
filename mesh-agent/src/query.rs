//! Questions that change nothing: from the local socket, and from an operator by way of `keyd`.

use tokio::sync::{mpsc, oneshot};
use warren_agent_api::{EndpointPolicyStatus, Request, Response, TraceRequest};
use warren_model::IdentityId;

use crate::{
    policy::{self, ToEnforcer},
    runner::{Input, Runner},
};

/// The longest answer to a question that came by way of `keyd`, bytes.
const LONGEST: usize = 1024 * 1024;

/// The request of a question, answered; a sentence where it cannot be.
pub(crate) async fn answer(
    inputs: &mpsc::UnboundedSender<Input>,
    request_json: &str,
) -> Result<String, String> {
    let request: Request =
        serde_json::from_str(request_json).map_err(|error| format!("the request cannot be read: {error}"))?;
    match request {
        Request::EncryptStatus
        | Request::Status
        | Request::Endpoints
        | Request::Policy { .. }
        | Request::PolicyTrace(_)
        | Request::Conntrack { .. }
        | Request::PolicyEvents { .. } => {}
        Request::CniAdd(_)
        | Request::CniDel(_)
        | Request::CniCheck(_)
        | Request::CniGc { .. }
        | Request::CniStatus => {
            return Err("only questions are answered from afar, nothing is changed".into());
        }
    }
    let stopping = || "the agent is stopping".to_owned();
    let (reply, answered) = oneshot::channel();
    inputs
        .send(Input::Local(request, reply))
        .map_err(|_| stopping())?;
    let response = answered.await.map_err(|_| stopping())?;
    let json = serde_json::to_string(&response).map_err(|error| error.to_string())?;
    match json.len() <= LONGEST {
        true => Ok(json),
        false => Err(format!(
            "the answer has {} bytes, at most {LONGEST} are sent: ask for less",
            json.len()
        )),
    }
}

/// Endpoints with their policies: all, or one of them.
pub(crate) fn policies(
    runner: &Runner,
    endpoint: Option<u16>,
    entries: bool,
    reply: oneshot::Sender<Response>,
) {
    let all = endpoints(runner);
    let wanted: Vec<_> = all
        .into_iter()
        .filter(|one| endpoint.is_none_or(|index| one.endpoint == index))
        .collect();
    if let (Some(index), true) = (endpoint, wanted.is_empty()) {
        let _ = reply.send(refuse(format!("this node has no endpoint {index}")));
        return;
    }
    let (described, description) = oneshot::channel();
    let _ = runner
        .enforcer
        .send(ToEnforcer::Describe(wanted, entries, described));
    tokio::spawn(async move {
        let response = match description.await {
            Ok(policies) => Response::Policies(policies),
            Err(_) => refuse("policy is not answering: restart the agent".into()),
        };
        let _ = reply.send(response);
    });
}

/// The host and all pods, without what policy knows of them.
fn endpoints(runner: &Runner) -> Vec<EndpointPolicyStatus> {
    let own = runner.agent.own_record();
    let host = policy::unknown(
        0,
        None,
        own.map(|node| node.addresses.clone()).unwrap_or_default(),
        IdentityId::HOST,
        Vec::new(),
    );
    let desired = &runner.agent.desired().endpoints;
    let pods = runner.agent.endpoints().iter().map(|(index, endpoint)| {
        let record = endpoint
            .addresses
            .iter()
            .find_map(|address| runner.agent.workload(*address));
        let identity = desired
            .get(&endpoint.ifindex)
            .map_or(endpoint.identity, |entry| entry.identity);
        let labels = runner.agent.labels(identity).into_iter();
        let labels = labels.flat_map(|labels| &labels.0);
        policy::unknown(
            index,
            endpoint
                .pod
                .clone()
                .or_else(|| record.map(|record| record.pod.clone())),
            endpoint.addresses.iter().copied().collect(),
            identity,
            labels.map(|(key, value)| format!("{key}={value}")).collect(),
        )
    });
    std::iter::once(host).chain(pods).collect()
}

/// What maps and model say of a packet.
pub(crate) fn trace(runner: &Runner, request: &TraceRequest, reply: oneshot::Sender<Response>) {
    let endpoint = match request.pod {
        None => Some(0),
        Some(address) => runner
            .agent
            .endpoints()
            .by_address(address)
            .map(|(index, _)| index),
    };
    match endpoint {
        Some(endpoint) => {
            let packet = policy::packet(endpoint, request);
            let _ = runner.enforcer.send(ToEnforcer::Trace(packet, reply));
        }
        None => {
            let address = request.pod.map(|address| address.to_string()).unwrap_or_default();
            let _ = reply.send(refuse(format!("no pod of this node has the address {address}")));
        }
    }
}

/// Tracked flows.
pub(crate) fn conntrack(
    runner: &Runner,
    endpoint: Option<u16>,
    limit: u32,
    reply: oneshot::Sender<Response>,
) {
    let shared = runner.shared.clone();
    tokio::task::spawn_blocking(move || {
        let _ = reply.send(shared.conntrack(endpoint, limit));
    });
}

/// The last events.
pub(crate) fn events(runner: &Runner, limit: u32) -> Response {
    let events = runner.shared.events.last(policy::event_limit(limit));
    let lost = runner.shared.report().events_lost;
    Response::Events { events, lost }
}

fn refuse(message: String) -> Response {
    Response::Error {
        message,
        retry: false,
    }
}
