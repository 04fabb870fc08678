//! `mesh-agent endpoints`, `policy`, `conntrack` and `events`.

use std::{net::IpAddr, net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use comfy_table::{Table, presets};
use serde::Serialize;
use warren_agent_api::{EndpointPolicyStatus, EventStatus, FlowStatus, Request, Response, call};
use warren_model::policy::Direction;

use super::answer::{direction_name, protocol_name};
use crate::{
    cli::{ListOptions, Output, PolicyOptions, Selected, StatusOptions},
    status::unexpected,
};

/// How long the agent may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// `mesh-agent endpoints`.
pub(crate) fn endpoints_main(options: &StatusOptions) -> ExitCode {
    match call(&options.socket, &Request::Endpoints, ANSWER_TIME) {
        Ok(Response::Policies(endpoints)) => show(options.output, &endpoints, || endpoints_text(&endpoints)),
        other => unexpected(other),
    }
}

/// `mesh-agent policy`.
pub(crate) fn policy_main(options: &PolicyOptions) -> ExitCode {
    let status = &options.common;
    let endpoint = match options.endpoint.as_ref().map(|of| index_of(&status.socket, of)) {
        Some(Err(code)) => return code,
        Some(Ok(index)) => Some(index),
        None => None,
    };
    match call(&status.socket, &Request::Policy { endpoint }, ANSWER_TIME) {
        Ok(Response::Policies(policies)) => show(status.output, &policies, || {
            let texts: Vec<String> = policies.iter().map(policy_text).collect();
            texts.join("\n")
        }),
        other => unexpected(other),
    }
}

/// `mesh-agent conntrack`.
pub(crate) fn conntrack_main(options: &ListOptions) -> ExitCode {
    let status = &options.common;
    let endpoint = match options.endpoint.as_ref().map(|of| index_of(&status.socket, of)) {
        Some(Err(code)) => return code,
        Some(Ok(index)) => Some(index),
        None => None,
    };
    let limit = options.limit;
    match call(
        &status.socket,
        &Request::Conntrack { endpoint, limit },
        ANSWER_TIME,
    ) {
        Ok(Response::Flows(flows)) => show(status.output, &flows, || flows_text(&flows)),
        other => unexpected(other),
    }
}

/// `mesh-agent events`.
pub(crate) fn events_main(options: &ListOptions) -> ExitCode {
    let status = &options.common;
    let addresses = match options
        .endpoint
        .as_ref()
        .map(|of| addresses_of(&status.socket, of))
    {
        Some(Err(code)) => return code,
        Some(Ok(addresses)) => Some(addresses),
        None => None,
    };
    let limit = options.limit;
    match call(&status.socket, &Request::PolicyEvents { limit }, ANSWER_TIME) {
        Ok(Response::Events { mut events, lost }) => {
            events.retain(|event| {
                let ends = [event.source, event.destination].into_iter().flatten();
                let mut ends = ends.map(|end| end.ip());
                addresses
                    .as_ref()
                    .is_none_or(|addresses| ends.any(|end| addresses.contains(&end)))
            });
            let all = serde_json::json!({ "events": events, "lost": lost });
            show(status.output, &all, || events_text(&events, lost))
        }
        other => unexpected(other),
    }
}

/// The index of an endpoint that is named by number or by pod.
fn index_of(socket: &Path, selected: &Selected) -> Result<u16, ExitCode> {
    match selected {
        Selected::Index(index) => Ok(*index),
        Selected::Pod(..) => find(socket, selected).map(|endpoint| endpoint.endpoint),
    }
}

/// The addresses of an endpoint.
fn addresses_of(socket: &Path, selected: &Selected) -> Result<Vec<IpAddr>, ExitCode> {
    find(socket, selected).map(|endpoint| endpoint.addresses)
}

fn find(socket: &Path, selected: &Selected) -> Result<EndpointPolicyStatus, ExitCode> {
    let endpoints = match call(socket, &Request::Endpoints, ANSWER_TIME) {
        Ok(Response::Policies(endpoints)) => endpoints,
        other => return Err(unexpected(other)),
    };
    let is_it = |endpoint: &EndpointPolicyStatus| match selected {
        Selected::Index(index) => endpoint.endpoint == *index,
        Selected::Pod(namespace, name) => endpoint
            .pod
            .as_ref()
            .is_some_and(|pod| pod.namespace == *namespace && pod.name == *name),
    };
    endpoints.into_iter().find(is_it).ok_or_else(|| {
        let what = match selected {
            Selected::Index(index) => format!("endpoint {index}"),
            Selected::Pod(namespace, name) => format!("pod {namespace}/{name}"),
        };
        eprintln!("mesh-agent: this node has no {what}");
        ExitCode::FAILURE
    })
}

fn show(output: Output, value: &impl Serialize, text: impl Fn() -> String) -> ExitCode {
    match output {
        Output::Text => print!("{}", text()),
        Output::Json => match serde_json::to_string_pretty(value) {
            Ok(json) => println!("{json}"),
            Err(error) => {
                eprintln!("mesh-agent: {error}");
                return ExitCode::FAILURE;
            }
        },
    }
    ExitCode::SUCCESS
}

/// A table without lines, as kubectl prints it.
fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    format!("{}\n", table.trim_fmt())
}

fn endpoints_text(endpoints: &[EndpointPolicyStatus]) -> String {
    let word = |enforced: bool| if enforced { "enforced" } else { "open" };
    let row = |endpoint: &EndpointPolicyStatus| {
        let (ingress, egress) = match endpoint.closed {
            true => ("closed", "closed"),
            false => (word(endpoint.ingress_enforced), word(endpoint.egress_enforced)),
        };
        vec![
            endpoint.endpoint.to_string(),
            name(endpoint),
            addresses(&endpoint.addresses),
            identity(endpoint),
            ingress.into(),
            egress.into(),
            if endpoint.audit { "yes" } else { "no" }.into(),
        ]
    };
    let header = [
        "ENDPOINT",
        "POD",
        "ADDRESSES",
        "IDENTITY",
        "INGRESS",
        "EGRESS",
        "AUDIT",
    ];
    table(&header, endpoints.iter().map(row).collect())
}

fn name(endpoint: &EndpointPolicyStatus) -> String {
    match (&endpoint.pod, endpoint.endpoint) {
        (Some(pod), _) => pod.to_string(),
        (None, 0) => "(host)".into(),
        (None, _) => "(not known yet)".into(),
    }
}

fn identity(endpoint: &EndpointPolicyStatus) -> String {
    match endpoint.identity.reserved_name() {
        Some(name) => format!("{} ({name})", endpoint.identity),
        None => endpoint.identity.to_string(),
    }
}

fn addresses(addresses: &[IpAddr]) -> String {
    let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    all.join(",")
}

fn policy_text(policy: &EndpointPolicyStatus) -> String {
    let mut out = format!("Endpoint {}: {}\n", policy.endpoint, name(policy));
    out += &format!("  Identity: {}\n", identity(policy));
    if !policy.labels.is_empty() {
        out += &format!("  Labels: {}\n", policy.labels.join(", "));
    }
    let state = match (policy.closed, policy.ingress_enforced, policy.egress_enforced) {
        (true, _, _) => "closed: its policy is not written",
        (false, true, true) => "enforced at ingress and egress",
        (false, true, false) => "enforced at ingress",
        (false, false, true) => "enforced at egress",
        (false, false, false) => "open: no policy selects it",
    };
    let audit = if policy.audit {
        ", audit mode: nothing is dropped"
    } else {
        ""
    };
    out += &format!("  State: {state}{audit}\n");
    let row = |entry: &warren_agent_api::PolicyEntryStatus| {
        vec![
            direction_name(entry.direction).to_owned(),
            entry.ports.clone(),
            if entry.allow { "allow" } else { "deny" }.to_owned(),
            entry.peer.clone(),
            entry.rule.clone(),
        ]
    };
    if !policy.entries.is_empty() {
        let header = ["DIRECTION", "PORTS", "VERDICT", "PEER", "RULE"];
        for line in table(&header, policy.entries.iter().map(row).collect()).lines() {
            out += &format!("  {line}\n");
        }
    }
    out
}

fn flows_text(flows: &[FlowStatus]) -> String {
    let row = |flow: &FlowStatus| {
        let (from, to) = match flow.direction {
            Direction::Ingress => (flow.remote, flow.local),
            Direction::Egress => (flow.local, flow.remote),
        };
        vec![
            flow.endpoint.to_string(),
            direction_name(flow.direction).into(),
            protocol_name(flow.protocol),
            from.to_string(),
            to.to_string(),
            flow.peer.to_string(),
            flow.state.clone(),
            format!("{}s", flow.idle_seconds),
            format!("{}s", flow.expires_seconds),
            flow.rule.clone().unwrap_or_default(),
        ]
    };
    let header = [
        "ENDPOINT",
        "DIRECTION",
        "PROTOCOL",
        "FROM",
        "TO",
        "PEER",
        "STATE",
        "IDLE",
        "EXPIRES",
        "RULE",
    ];
    table(&header, flows.iter().map(row).collect())
}

fn events_text(events: &[EventStatus], lost: u64) -> String {
    let socket = |address: Option<SocketAddr>, identity| match address {
        Some(address) => format!("{address} ({identity})"),
        None => "?".into(),
    };
    let row = |event: &EventStatus| {
        vec![
            clock(event.time_unix_ms),
            event.outcome.clone(),
            event.hook.clone(),
            event.direction.map_or("", direction_name).into(),
            protocol_name(event.protocol),
            socket(event.source, event.source_identity),
            socket(event.destination, event.destination_identity),
            event.packets.to_string(),
            event.reason.clone().unwrap_or_default(),
            event.rule.clone().unwrap_or_default(),
        ]
    };
    let header = [
        "TIME",
        "OUTCOME",
        "PROGRAM",
        "DIRECTION",
        "PROTOCOL",
        "FROM (IDENTITY)",
        "TO (IDENTITY)",
        "PACKETS",
        "REASON",
        "RULE",
    ];
    let mut out = table(&header, events.iter().map(row).collect());
    if lost > 0 {
        out += &format!("\n{lost} events were lost since the maps were made\n");
    }
    out
}

/// Time of day, UTC.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!(
        "{hours:02}:{minutes:02}:{:02}.{:03}",
        seconds % 60,
        unix_ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use warren_model::{IdentityId, PodRef};

    use super::*;

    #[test]
    fn tables_say_what_is_enforced() {
        let endpoint = EndpointPolicyStatus {
            endpoint: 3,
            pod: Some(PodRef {
                namespace: "demo".into(),
                name: "api".into(),
                uid: "u".into(),
            }),
            addresses: vec!["10.244.1.5".parse().unwrap()],
            identity: IdentityId(300),
            labels: vec![],
            closed: false,
            ingress_enforced: true,
            egress_enforced: false,
            audit: false,
            entries: vec![],
        };
        let text = endpoints_text(std::slice::from_ref(&endpoint));
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            line,
            ["3", "demo/api", "10.244.1.5", "300", "enforced", "open", "no"]
        );
        let closed = EndpointPolicyStatus {
            closed: true,
            ..endpoint
        };
        assert!(policy_text(&closed).contains("State: closed"));
        assert_eq!(clock(86_399_007), "23:59:59.007");
    }
}
