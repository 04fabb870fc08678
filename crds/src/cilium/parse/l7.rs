//! Checks of layer-7 rules, and what of them is left for later.

use warren_model::policy::{Direction, Unenforced};

use super::faults::{Faults, Path};
use crate::cilium::{
    l7::{DnsRule, HttpRule, KafkaRule},
    spec::PortRule,
};

/// Checks what a list of ports asks for above layer 4, and says which parts cannot be enforced.
pub(super) fn check(
    path: &Path,
    rule: &PortRule,
    direction: Direction,
    faults: &mut Faults,
) -> Vec<Unenforced> {
    let mut parts = Vec::new();
    let proxy = rule.server_names.is_some()
        || rule.terminating_tls.is_some()
        || rule.originating_tls.is_some()
        || rule.listener.is_some();
    if proxy {
        parts.push(Unenforced::Proxy);
    }
    let Some(rules) = &rule.rules else { return parts };
    let at = path.member("rules");
    let kinds = [rules.http.is_some(), rules.kafka.is_some(), rules.dns.is_some()];
    if kinds.iter().filter(|there| **there).count() > 1 {
        faults.add(
            &at,
            "has more than one of http, kafka and dns: write one list of rules per entry of toPorts",
        );
    }
    if rules.http.is_some() || rules.kafka.is_some() {
        let name = if rules.http.is_some() { "HTTP" } else { "Kafka" };
        for (i, port) in rule.ports.iter().flatten().enumerate() {
            if port.protocol.as_deref() != Some("TCP") {
                let at = path.member("ports").item(i).member("protocol");
                faults.add(&at, format!("{name} rules need protocol TCP"));
            }
        }
    }
    for (i, port) in rule.ports.iter().flatten().enumerate() {
        if port.port.as_deref() == Some("0") && kinds.contains(&true) {
            faults.add(
                &path.member("ports").item(i).member("port"),
                "layer-7 rules need a port, not 0",
            );
        }
    }
    if let Some(http) = &rules.http {
        parts.push(Unenforced::Http);
        http.iter()
            .enumerate()
            .for_each(|(i, rule)| check_http(&at.member("http").item(i), rule, faults));
    }
    if let Some(kafka) = &rules.kafka {
        parts.push(Unenforced::Kafka);
        kafka
            .iter()
            .enumerate()
            .for_each(|(i, rule)| check_kafka(&at.member("kafka").item(i), rule, faults));
    }
    if let Some(dns) = &rules.dns {
        parts.push(Unenforced::Dns);
        if direction == Direction::Ingress {
            faults.add(&at.member("dns"), "DNS rules are for egress only");
        }
        dns.iter()
            .enumerate()
            .for_each(|(i, rule)| check_dns(&at.member("dns").item(i), rule, faults));
    }
    parts
}

fn check_http(path: &Path, rule: &HttpRule, faults: &mut Faults) {
    for (name, text) in [
        ("path", &rule.path),
        ("method", &rule.method),
        ("host", &rule.host),
    ] {
        if let Some(Err(error)) = text.as_deref().map(regex::Regex::new) {
            let reason = error
                .to_string()
                .lines()
                .last()
                .unwrap_or_default()
                .trim()
                .to_owned();
            faults.add(&path.member(name), format!("is no regular expression: {reason}"));
        }
    }
    for (i, header) in rule.headers.iter().flatten().enumerate() {
        let name = header.split([':', ' ']).next().unwrap_or_default();
        if !is_header_name(name) {
            let problem = format!("{header:?} is no header: write \"Name\" or \"Name: value\"");
            faults.add(&path.member("headers").item(i), problem);
        }
    }
    for (i, header) in rule.header_matches.iter().flatten().enumerate() {
        let at = path.member("headerMatches").item(i);
        if !is_header_name(&header.name) {
            faults.add(&at.member("name"), format!("{:?} is no header name", header.name));
        }
        if !matches!(
            header.mismatch.as_deref(),
            None | Some("LOG" | "ADD" | "DELETE" | "REPLACE")
        ) {
            faults.add(&at.member("mismatch"), "write LOG, ADD, DELETE or REPLACE");
        }
    }
}

/// A token of RFC 9110.
fn is_header_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn check_kafka(path: &Path, rule: &KafkaRule, faults: &mut Faults) {
    let set = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if set(&rule.role) && set(&rule.api_key) {
        faults.add(path, "has both role and apiKey: write one of them");
    }
    if set(&rule.role) && !matches!(rule.role.as_deref(), Some("produce" | "consume")) {
        faults.add(&path.member("role"), "write produce or consume");
    }
    if rule
        .api_version
        .as_deref()
        .is_some_and(|text| !text.is_empty() && text.parse::<i16>().is_err())
    {
        faults.add(&path.member("apiVersion"), "is no number");
    }
    let topic = rule.topic.as_deref().unwrap_or_default();
    if !topic
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        || topic.len() > 255
    {
        faults.add(&path.member("topic"), format!("{topic:?} is no topic"));
    }
}

/// Checks a DNS name or pattern; exactly one of them.
pub(super) fn check_dns(path: &Path, rule: &DnsRule, faults: &mut Faults) {
    let legal = |text: &str, marks: &[u8]| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || marks.contains(&b))
    };
    match (&rule.match_name, &rule.match_pattern) {
        (Some(_), Some(_)) => faults.add(path, "has both matchName and matchPattern: write one of them"),
        (None, None) => faults.add(path, "write matchName or matchPattern"),
        (Some(name), None) if !legal(name, b"-._") => {
            faults.add(&path.member("matchName"), format!("{name:?} is no DNS name"));
        }
        (None, Some(pattern)) if !legal(pattern, b"-._*") => {
            faults.add(
                &path.member("matchPattern"),
                format!("{pattern:?} is no pattern of DNS names"),
            );
        }
        _ => {}
    }
}
