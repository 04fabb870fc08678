//! Pods come and go: the requests of the CNI plugin.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use tokio::{sync::oneshot, time::Instant};
use warren_agent_api::{Attachment, AttachmentKey, Response};
use warren_agent_core::{Endpoint, EndpointKey};
use warren_model::{IdentityId, PrefixSource};

use crate::{
    keyd::{Refused, ToKeyd},
    runner::{Input, Runner, Waiting},
};

/// How long `keyd` may take to name an identity: it may have to wait until other agents let go of the address.
const IDENTITY_TIME: Duration = Duration::from_secs(12);
/// How long programs may take; the plugin itself waits 30 s for everything.
const PROGRAM_TIME: Duration = Duration::from_secs(12);

fn refuse(message: impl Into<String>, retry: bool) -> Response {
    Response::Error {
        message: message.into(),
        retry,
    }
}

/// CNI ADD: the identity first, then the programs; answered when traffic may flow.
pub(crate) async fn add(runner: &mut Runner, attachment: Attachment, reply: oneshot::Sender<Response>) {
    if let Err(response) = acceptable(runner, &attachment) {
        let _ = reply.send(response);
        return;
    }
    let (answer, answered) = oneshot::channel();
    let endpoint = endpoint(&attachment, IdentityId::INIT);
    let _ = runner.to_keyd.send(ToKeyd::Add(Box::new(endpoint), answer));
    let inputs = runner.inputs.clone();
    tokio::spawn(async move {
        let result = match tokio::time::timeout(IDENTITY_TIME, answered).await {
            Ok(Ok(result)) => result,
            // A session that broke, or a keyd that hangs: as good as away.
            Ok(Err(_)) | Err(_) => Err(Refused::Unreachable),
        };
        let _ = inputs.send(Input::Identity(Box::new(attachment), result, reply));
    });
}

fn acceptable(runner: &Runner, attachment: &Attachment) -> Result<(), Response> {
    if attachment.addresses.is_empty() {
        return Err(refuse("the plugins before gave the pod no address", false));
    }
    let pools = &runner.config.cluster.pod_pools;
    if let Some(stray) = attachment
        .addresses
        .iter()
        .find(|a| !pools.iter().any(|pool| pool.contains(*a)))
    {
        let message = format!(
            "pod address {stray} lies outside podPools: add its prefix to the cluster's configuration"
        );
        return Err(refuse(message, false));
    }
    for ipv6 in [false, true] {
        let count = attachment
            .addresses
            .iter()
            .filter(|address| address.is_ipv6() == ipv6)
            .count();
        if count > warren_abi::MAX_ENDPOINT_ADDRESSES {
            return Err(refuse(
                format!("the pod has {count} addresses of one family: at most 4 are supported"),
                false,
            ));
        }
    }
    Ok(())
}

/// `keyd` answered, or is away.
pub(crate) fn identified(
    runner: &mut Runner,
    attachment: Attachment,
    result: Result<IdentityId, Refused>,
    reply: oneshot::Sender<Response>,
) {
    let identity = match result {
        Ok(identity) => identity,
        Err(Refused::No { reason, retry }) => {
            let _ = reply.send(refuse(
                format!("keyd refuses pod {}: {reason}", attachment.pod),
                retry,
            ));
            return;
        }
        Err(Refused::Unreachable) => match without_keyd(runner, &attachment) {
            Ok(()) => IdentityId::INIT,
            Err(message) => {
                let _ = reply.send(refuse(message, true));
                return;
            }
        },
    };
    let held = runner.observed.state.clone();
    runner.agent.set_occupied(runner.shared.occupied());
    match runner.agent.add_endpoint(endpoint(&attachment, identity), &held) {
        Some(index) => {
            tracing::info!(pod = %attachment.pod, index, %identity, addresses = ?attachment.addresses, "pod added");
            runner.waiting.push(Waiting {
                index,
                reply,
                deadline: Instant::now() + PROGRAM_TIME,
            });
            runner.mark_dirty();
        }
        None => {
            let _ = reply.send(refuse(
                "this node has as many pods as the packet mark can name (4095)",
                true,
            ));
        }
    }
}

/// With `keyd` away a pod may start where its address is this node's own beyond doubt; its identity comes later.
fn without_keyd(runner: &Runner, attachment: &Attachment) -> Result<(), String> {
    let why = runner
        .keyd_fault
        .clone()
        .unwrap_or_else(|| "it does not answer".into());
    if runner.config.cluster.prefix_source == PrefixSource::PodIp {
        return Err(format!(
            "keyd cannot confirm who owns {}: {why}",
            list(&attachment.addresses)
        ));
    }
    let Some(own) = runner.agent.own_record() else {
        return Err(format!("this node's own prefixes are not known yet: {why}"));
    };
    match attachment
        .addresses
        .iter()
        .find(|address| !own.prefixes.iter().any(|prefix| prefix.contains(*address)))
    {
        Some(stray) => Err(format!(
            "pod address {stray} lies outside this node's prefixes, and keyd is away: {why}"
        )),
        None => Ok(()),
    }
}

/// Answers the ADDs whose pods are programmed, or will not be in time.
pub(crate) fn settle(runner: &mut Runner) {
    for waiting in std::mem::take(&mut runner.waiting) {
        let written = runner.shared.is_written(waiting.index);
        if runner.agent.endpoint_ready(waiting.index) && written {
            let _ = waiting.reply.send(Response::Done);
        } else if runner.agent.endpoints().get(waiting.index).is_none() {
            let _ = waiting.reply.send(refuse("the pod's device is gone", false));
        } else if Instant::now() >= waiting.deadline {
            let failing = runner.shared.report().failing.first().cloned();
            let why = runner.agent.failing().into_iter().next().or(failing);
            let why = why.unwrap_or_else(|| match written {
                true => "it took too long".into(),
                false => "its identity is not in the directory yet, so that its policy is not known".into(),
            });
            let _ = waiting
                .reply
                .send(refuse(format!("the pod could not be programmed: {why}"), true));
        } else {
            runner.waiting.push(waiting);
        }
    }
}

/// CNI DEL. Program and entry stay until the device is gone: a terminating pod still sends.
pub(crate) fn delete(runner: &mut Runner, key: &AttachmentKey) -> Response {
    if let Some(endpoint) = runner.agent.delete_endpoint(&key_of(key)) {
        tracing::info!(pod = ?endpoint.pod, "pod deleted");
        runner.tell_gone(endpoint);
        runner.save_endpoints();
        runner.mark_dirty();
    }
    Response::Done
}

/// CNI CHECK.
pub(crate) fn check(runner: &Runner, attachment: &Attachment) -> Response {
    let found = runner
        .agent
        .endpoints()
        .by_key(&key_of(&attachment.key))
        .filter(|(_, e)| !e.deleted);
    let Some((index, endpoint)) = found else {
        return refuse(
            format!("pod {} is not known to this agent", attachment.pod),
            false,
        );
    };
    let addresses: BTreeSet<IpAddr> = attachment.addresses.iter().copied().collect();
    if endpoint.addresses != addresses {
        return refuse(
            format!("pod {} has other addresses than at ADD", attachment.pod),
            false,
        );
    }
    if endpoint.ifindex != attachment.host_ifindex {
        return refuse(
            format!("pod {} has another device than at ADD", attachment.pod),
            false,
        );
    }
    match (
        runner.agent.endpoint_ready(index),
        runner.shared.is_written(index),
    ) {
        (true, true) => Response::Done,
        (false, _) => refuse(format!("pod {} is not programmed", attachment.pod), true),
        (true, false) => refuse(
            format!("the policy of pod {} is not written", attachment.pod),
            true,
        ),
    }
}

/// CNI GC: every attachment that is not listed counts as deleted.
pub(crate) fn collect(runner: &mut Runner, valid: &[AttachmentKey]) -> Response {
    let valid: BTreeSet<EndpointKey> = valid.iter().map(key_of).collect();
    let stale: Vec<EndpointKey> = runner
        .agent
        .endpoints()
        .iter()
        .filter(|(_, endpoint)| !endpoint.deleted)
        .filter_map(|(_, endpoint)| endpoint.key.clone())
        .filter(|key| !valid.contains(key))
        .collect();
    for key in stale {
        delete(
            runner,
            &AttachmentKey {
                container_id: key.container_id,
                ifname: key.ifname,
            },
        );
    }
    Response::Done
}

/// CNI STATUS.
pub(crate) fn status(runner: &Runner) -> Response {
    runner.not_ready().map_or(Response::Done, |why| refuse(why, true))
}

fn key_of(key: &AttachmentKey) -> EndpointKey {
    EndpointKey {
        container_id: key.container_id.clone(),
        ifname: key.ifname.clone(),
    }
}

fn endpoint(attachment: &Attachment, identity: IdentityId) -> Endpoint {
    Endpoint {
        key: Some(key_of(&attachment.key)),
        pod: Some(attachment.pod.clone()),
        ifindex: attachment.host_ifindex,
        mac: attachment.mac,
        addresses: attachment.addresses.iter().copied().collect(),
        identity,
        deleted: false,
    }
}

fn list(addresses: &[IpAddr]) -> String {
    addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}
