//! Pods that are older than the agent: from the pinned maps, and by their devices.

use warren_agent_core::Endpoint;
use warren_model::IdentityId;

use crate::runner::Runner;

/// Finds pods that no file tells of. What cannot be explained stays behind the barrier.
pub(crate) async fn adopt(runner: &mut Runner) {
    let observed = match runner.machine.observe().await {
        Ok(observed) => observed,
        Err(error) => {
            tracing::error!(error = %format!("{error:#}"), "the node's state cannot be read: no pod is adopted");
            return;
        }
    };
    runner.agent.links_seen(&observed);
    runner.agent.set_occupied(runner.shared.occupied());
    for (ifindex, entry) in &observed.state.endpoints {
        let present = observed.links.iter().any(|link| link.ifindex == *ifindex);
        if present && runner.agent.endpoints().by_link(*ifindex).is_none() {
            let endpoint = Endpoint {
                key: None,
                pod: None,
                ifindex: *ifindex,
                mac: entry.mac,
                addresses: entry.addresses.clone(),
                identity: entry.identity,
                deleted: false,
            };
            runner.agent.add_endpoint(endpoint, &observed.state);
        }
    }
    let pools = runner.config.cluster.pod_pools.clone();
    for veth in runner.machine.pod_veths(&runner.config.options.netns_dir).await {
        if runner.agent.endpoints().by_link(veth.ifindex).is_some() {
            continue;
        }
        let addresses: std::collections::BTreeSet<_> = veth
            .addresses
            .into_iter()
            .filter(|address| pools.iter().any(|pool| pool.contains(address)))
            .collect();
        if addresses.is_empty() {
            continue;
        }
        let Some(mac) = veth.mac else {
            tracing::warn!(
                ifindex = veth.ifindex,
                "a pod's device whose MAC address is not known stays behind the barrier"
            );
            continue;
        };
        tracing::info!(ifindex = veth.ifindex, ?addresses, seen_by = ?veth.seen_by, "adopted a pod");
        let endpoint = Endpoint {
            key: None,
            pod: None,
            ifindex: veth.ifindex,
            mac,
            addresses,
            identity: IdentityId::INIT,
            deleted: false,
        };
        runner.agent.add_endpoint(endpoint, &observed.state);
    }
}
