//! `warren policy get`: the policy objects and what keyd makes of them.

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use warren_keyd_api::proto::PolicyStatus;

use crate::{
    args::{Format, OutputOptions, Target},
    output,
    source::Source,
};

#[derive(Debug, Clone, Args)]
pub(crate) struct GetOptions {
    /// Only this one: namespace/name, or the name of an object without a namespace.
    #[arg(value_name = "NAMESPACE/NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

/// A policy object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Policy {
    namespace: String,
    name: String,
    kind: String,
    valid: bool,
    message: String,
    rules: u64,
}

impl From<PolicyStatus> for Policy {
    fn from(status: PolicyStatus) -> Self {
        Self {
            namespace: status.namespace,
            name: status.name,
            kind: status.kind,
            valid: status.valid,
            message: status.message,
            rules: status.rules,
        }
    }
}

impl Policy {
    fn is(&self, name: &str) -> bool {
        match name.split_once('/') {
            Some((namespace, name)) => self.namespace == namespace && self.name == name,
            None => self.namespace.is_empty() && self.name == name,
        }
    }
}

/// Prints the objects; `false` where one of them is invalid.
pub(crate) async fn run(target: &Target, options: &GetOptions) -> anyhow::Result<bool> {
    let mut keyd = Source::open(target).await?.keyd().await?;
    let mut policies: Vec<Policy> = keyd.policies().await?.into_iter().map(Policy::from).collect();
    if let Some(name) = &options.name {
        policies.retain(|policy| policy.is(name));
        if policies.is_empty() {
            bail!("there is no policy {name}: `warren policy get` shows them all");
        }
    }
    policies.sort_by(|a, b| (&a.namespace, &a.name, &a.kind).cmp(&(&b.namespace, &b.name, &b.kind)));
    match options.output.output {
        Format::Json => output::json(&policies)?,
        Format::Text => output::print(&text(&policies))?,
    }
    Ok(policies.iter().all(|policy| policy.valid))
}

fn text(policies: &[Policy]) -> String {
    let rows = policies.iter().map(|policy| {
        vec![
            if policy.namespace.is_empty() {
                "-".into()
            } else {
                policy.namespace.clone()
            },
            policy.name.clone(),
            policy.kind.clone(),
            if policy.valid { "True" } else { "False" }.into(),
            policy.message.clone(),
        ]
    });
    output::table(&["NAMESPACE", "NAME", "KIND", "VALID", "MESSAGE"], rows.collect()) + "\n"
}
