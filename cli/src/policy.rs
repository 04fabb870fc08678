//! `warren policy validate`: says offline what the `Valid` condition would say, with the line in the file.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;
use warren_crds::cilium;
use warren_model::policy::{PolicyError, PolicyRef};

use crate::{
    args::{Format, OutputOptions, Target},
    output,
    policy_get::{self, GetOptions},
    policy_yaml::{Located, documents},
    trace::{self, TraceOptions},
};

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Are the policies in these files right? Asks no cluster.
    ///
    /// Reads CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, CiliumCIDRGroup and NetworkPolicy, several documents
    /// per file, and shows each fault with its file and line. Other objects are passed over.
    #[command(
        after_help = "Examples:\n  warren policy validate -f policy.yaml -f more.yaml\n  kubectl get cnp -A -o yaml | warren policy validate -f -"
    )]
    Validate(ValidateOptions),
    /// The policies of the cluster, and what keyd makes of them.
    ///
    /// VALID says whether an object is enforced; MESSAGE what is wrong with it, or which of its parts cannot be enforced.
    #[command(
        after_help = "Examples:\n  warren policy get\n  warren policy get demo/api\n  warren policy get -o json | jq '.[] | select(.valid | not)'"
    )]
    Get(GetOptions),
    /// Why does a connection pass, or not?
    ///
    /// Asks the agents at both ends: egress where the connection starts, ingress where it arrives. Each shows what its eBPF
    /// maps answer, beside the model's answer computed anew from the rules, and every statement that covers the
    /// connection. Fails where the connection is dropped, and where maps and model disagree.
    #[command(
        after_help = "Examples:\n  warren policy trace --from demo/frontend --to demo/api --port 5000\n  warren policy trace --from demo/api --to kube-system/coredns-1 --port 53/UDP\n  warren policy trace --from host:node1 --to demo/api --port 8080\n  warren policy trace --from demo/api --to world:192.0.2.7 --port 443 -o json"
    )]
    Trace(TraceOptions),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ValidateOptions {
    #[command(flatten)]
    pub(crate) output: OutputOptions,
    /// A file, or - for standard input; may be given several times.
    #[arg(long = "filename", short = 'f', value_name = "FILE", required = true, num_args = 1..)]
    pub(crate) files: Vec<PathBuf>,
}

/// What is wrong at a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Fault {
    file: String,
    line: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    path: String,
    problem: String,
}

/// A policy that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    file: String,
    line: u64,
    name: String,
    valid: bool,
    /// What cannot be enforced yet, and what happens instead.
    notes: Vec<String>,
}

/// Everything that was found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Findings {
    valid: bool,
    objects: Vec<Object>,
    faults: Vec<Fault>,
}

/// Runs it; `false` where something is wrong or denied.
pub(crate) async fn run(target: &Target, command: &PolicyCommand) -> anyhow::Result<bool> {
    match command {
        PolicyCommand::Validate(options) => validate_files(options),
        PolicyCommand::Get(options) => policy_get::run(target, options).await,
        PolicyCommand::Trace(options) => trace::run(target, options).await,
    }
}

/// Prints the findings; `false` where anything is wrong.
fn validate_files(options: &ValidateOptions) -> anyhow::Result<bool> {
    let mut findings = Findings::default();
    for file in &options.files {
        let name = if file == Path::new("-") {
            "standard input".into()
        } else {
            file.display().to_string()
        };
        match read(file) {
            Ok(text) => validate(&name, &text, &mut findings),
            Err(error) => findings.faults.push(Fault {
                file: name,
                line: 0,
                path: String::new(),
                problem: format!("cannot be read: {error}"),
            }),
        }
    }
    findings.valid = findings.faults.is_empty();
    match options.output.output {
        Format::Json => output::json(&findings)?,
        Format::Text => output::print(&text(&findings))?,
    }
    Ok(findings.valid)
}

fn read(file: &Path) -> std::io::Result<String> {
    if file != Path::new("-") {
        return std::fs::read_to_string(file);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

fn text(findings: &Findings) -> String {
    let mut out = String::new();
    for object in &findings.objects {
        let state = if object.valid { "valid" } else { "invalid" };
        out += &format!("{}:{}: {}: {state}\n", object.file, object.line, object.name);
        for note in &object.notes {
            out += &format!("{}:{}: note: {note}\n", object.file, object.line);
        }
    }
    for fault in &findings.faults {
        let path = if fault.path.is_empty() {
            String::new()
        } else {
            format!("{}: ", fault.path)
        };
        out += &format!("{}:{}: error: {path}{}\n", fault.file, fault.line, fault.problem);
    }
    if findings.objects.is_empty() && findings.faults.is_empty() {
        out += "no policy found\n";
    }
    out
}

fn validate(file: &str, text: &str, findings: &mut Findings) {
    for document in documents(text) {
        match Located::parse(&document.text) {
            Ok(located) => object(file, document.offset, &located, findings),
            Err((line, problem)) => findings.faults.push(Fault {
                file: file.to_owned(),
                line: document.offset + line,
                path: String::new(),
                problem: format!("is no YAML: {problem}"),
            }),
        }
    }
}

fn object(file: &str, offset: u64, located: &Located, findings: &mut Findings) {
    let value = located.value();
    let (kind, version) = (text_of(&value, "kind"), text_of(&value, "apiVersion"));
    if kind == "List" || kind.ends_with("PolicyList") || kind == "CiliumCIDRGroupList" {
        for item in located.member("items").into_iter().flat_map(Located::items) {
            object(file, offset, item, findings);
        }
        return;
    }
    let (name, outcome) = match kind {
        "CiliumCIDRGroup" if version.starts_with("cilium.io/") => {
            let name = value
                .pointer("/metadata/name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            (
                format!("CiliumCIDRGroup {name}"),
                cilium::check_group(&value).map(|_| Vec::new()),
            )
        }
        "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy" | "NetworkPolicy" => {
            let name = cilium::policy_ref(&value)
                .as_ref()
                .map_or_else(|_| kind.to_owned(), PolicyRef::to_string);
            (name, check(&value))
        }
        _ => return,
    };
    let valid = outcome.is_ok();
    let notes = outcome.as_ref().ok().cloned().unwrap_or_default();
    findings.objects.push(Object {
        file: file.to_owned(),
        line: offset + located.line(),
        name,
        valid,
        notes,
    });
    findings
        .faults
        .extend(outcome.err().into_iter().flatten().map(|fault| Fault {
            file: file.to_owned(),
            line: offset + located.line_of(&fault.path),
            path: fault.path,
            problem: fault.problem,
        }));
}

/// The notes on a policy, or its faults. The cluster's name makes no difference to either.
fn check(value: &Value) -> Result<Vec<String>, Vec<PolicyError>> {
    let rules = cilium::check(value, "default")?;
    Ok(rules.iter().flat_map(|rule| rule.notes()).collect())
}

fn text_of<'a>(value: &'a Value, member: &str) -> &'a str {
    value.get(member).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"# policies of the shop
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: db
  namespace: shop
spec:
  endpointSelector:
    matchLabels: {app: db}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: api}
    toPorts:
    - ports:
      - port: "5432"
        protocol: TCP
      - port: "70000"
        protocol: TCP
  - fromEntities:
    - planet
---
kind: CiliumNetworkPolicy
  apiVersion: wrong
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: open, namespace: shop}
spec:
  podSelector: {}
  ingres:
  - {}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {}
  ingress:
  - toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{method: GET}]
"#;

    fn find(text: &str) -> Findings {
        let mut findings = Findings::default();
        validate("f.yaml", text, &mut findings);
        findings
    }

    #[test]
    fn every_fault_has_its_line() {
        let findings = find(FILE);
        let faults: Vec<_> = findings
            .faults
            .iter()
            .map(|f| (f.line, f.path.as_str()))
            .collect();
        assert_eq!(
            faults,
            [
                (21, "spec.ingress[0].toPorts[0].ports[1].port"),
                (24, "spec.ingress[1].fromEntities[0]"),
                (27, ""),
                (34, "spec.ingres"),
            ]
        );
        let objects: Vec<_> = findings
            .objects
            .iter()
            .map(|o| (o.line, o.name.as_str(), o.valid))
            .collect();
        assert_eq!(
            objects,
            [
                (6, "CiliumNetworkPolicy shop/db", false),
                (29, "NetworkPolicy shop/open", false),
                (37, "CiliumNetworkPolicy shop/web", true),
            ]
        );
        let notes = &findings.objects[2].notes;
        assert_eq!(
            notes,
            &["spec.ingress[0].toPorts[0]: HTTP rules cannot be enforced yet: denied"]
        );
    }

    #[test]
    fn lists_groups_and_files_without_policies() {
        let list = "kind: List\nitems:\n- apiVersion: cilium.io/v2\n  kind: CiliumCIDRGroup\n  metadata:\n    name: o\n  spec:\n    externalCIDRs:\n    - 10.0.0.0/8\n    - nonsense\n";
        let findings = find(list);
        assert_eq!(findings.objects[0].name, "CiliumCIDRGroup o");
        assert_eq!(
            (findings.faults[0].line, findings.faults[0].path.as_str()),
            (10, "spec.externalCIDRs[1]")
        );
        let none = find("kind: Pod\n");
        assert!(none.objects.is_empty() && none.faults.is_empty());
        assert_eq!(text(&none), "no policy found\n");
    }

    #[test]
    fn text_points_at_the_line() {
        let shown = text(&find(FILE));
        assert!(
            shown.contains("f.yaml:37: CiliumNetworkPolicy shop/web: valid\n"),
            "{shown}"
        );
        assert!(
            shown.contains("f.yaml:24: error: spec.ingress[1].fromEntities[0]: \"planet\" is no entity"),
            "{shown}"
        );
    }
}
