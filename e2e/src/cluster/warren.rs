//! Installing Warren into a cluster, the way a user does: with Helm, from the chart.

use std::time::Duration;

use anyhow::Result;

use super::{Cluster, address, tools};
use crate::lab::net::{node_pools, pod_pools};

/// How long an installation may take until everything runs.
const INSTALL: Duration = Duration::from_secs(120);

impl Cluster {
    /// `helm install`, with more `--set` values; returns when everything is ready.
    pub fn install(&self, set: &[&str]) -> Result<()> {
        self.helm("install", set)?;
        self.wait_pods(INSTALL)
    }

    /// `helm upgrade` to other values; returns when everything is ready.
    pub fn upgrade(&self, set: &[&str]) -> Result<()> {
        self.helm("upgrade", set)?;
        self.wait_pods(INSTALL)
    }

    fn helm(&self, verb: &str, set: &[&str]) -> Result<()> {
        let list = |items: Vec<String>| format!("{{{}}}", items.join(","));
        let text = |items: [ipnet::IpNet; 2]| list(items.iter().map(ToString::to_string).collect());
        let mut command = vec![
            tools::path("helm")?,
            verb.into(),
            "warren".into(),
            tools::chart().display().to_string(),
            "--namespace=kube-system".into(),
            "--kubeconfig".into(),
            self.folder().join("pki/admin.conf").display().to_string(),
        ];
        let fixed = [
            format!("podPools={}", text(pod_pools())),
            format!("nodePools={}", text(node_pools())),
            format!(
                "serviceCIDRs={}",
                list(address::SERVICE_CIDRS.map(String::from).to_vec())
            ),
            "image.pullPolicy=Never".into(),
        ];
        for value in fixed
            .into_iter()
            .chain(set.iter().map(|value| (*value).to_owned()))
        {
            command.extend(["--set".into(), value]);
        }
        // Helm keeps a cache in the home folder; this one goes with the cluster.
        let home = format!("HELM_CACHE_HOME={}", self.folder().join("helm").display());
        let command = ["env".to_owned(), home].into_iter().chain(command);
        self.control_place().run(command).map(drop)
    }
}
