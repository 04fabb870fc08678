//! `keyd`'s admin service: the directory, the policies, and questions to the agents.

use std::{collections::BTreeMap, io, net::IpAddr, path::Path};

use anyhow::{Context as _, anyhow, bail};
use kube::api::AttachedProcess;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Status, transport::Channel};
use warren_agent_api::{Request, Response};
use warren_keyd_api::{
    admin::{self, DEFAULT_SOCKET},
    convert::Record,
    proto::{
        AskAgentRequest, DirectoryRequest, EntryKind, PoliciesRequest, PolicyStatus, StatusRequest,
        admin_client::AdminClient, keys_client::KeysClient,
    },
};
use warren_model::{IdentityId, Labels, NodeName, NodeRecord, WorkloadRecord, policy::NodeFacts};

use crate::args::Target;

/// A connection to the local socket's services.
pub(crate) struct Keyd {
    client: AdminClient<Channel>,
    keys: KeysClient<Channel>,
    /// What carries the connection.
    _process: Option<AttachedProcess>,
}

impl Keyd {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            client: AdminClient::new(channel.clone()),
            keys: KeysClient::new(channel),
            _process: None,
        }
    }

    /// Over the streams of a command in keyd's pod.
    pub(crate) async fn over<T>(streams: T, process: AttachedProcess) -> anyhow::Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let channel = admin::channel_over(streams)
            .await
            .context("keyd cannot be reached")?;
        Ok(Self {
            _process: Some(process),
            ..Self::new(channel)
        })
    }

    /// The service of keys and their rotation.
    pub(crate) fn keys(&mut self) -> &mut KeysClient<Channel> {
        &mut self.keys
    }

    /// Whether it is the leader: only that one knows everything.
    pub(crate) async fn leads(&mut self) -> anyhow::Result<bool> {
        Ok(self
            .client
            .status(StatusRequest {})
            .await
            .map_err(said)?
            .into_inner()
            .leader)
    }

    /// Every policy object with what keyd makes of it.
    pub(crate) async fn policies(&mut self) -> anyhow::Result<Vec<PolicyStatus>> {
        let response = self.client.policies(PoliciesRequest {}).await.map_err(said)?;
        Ok(response.into_inner().policies)
    }

    /// What the directory says of nodes, pods and identities.
    pub(crate) async fn directory(&mut self) -> anyhow::Result<Directory> {
        let kinds = [
            EntryKind::EntryNode,
            EntryKind::EntryIdentity,
            EntryKind::EntryWorkload,
            EntryKind::EntryNodeFacts,
        ];
        let request = DirectoryRequest {
            kinds: kinds.map(Into::into).to_vec(),
        };
        let mut chunks = self.client.directory(request).await.map_err(said)?.into_inner();
        let mut directory = Directory::default();
        while let Some(chunk) = chunks.message().await.map_err(said)? {
            for entry in &chunk.entries {
                directory.add(Record::parse(entry).context("keyd published a malformed entry")?);
            }
        }
        Ok(directory)
    }

    /// Asks the agent of a node.
    pub(crate) async fn ask(&mut self, node: &NodeName, request: &Request) -> anyhow::Result<Response> {
        let request = AskAgentRequest {
            node: node.to_string(),
            request_json: serde_json::to_string(request)?,
        };
        let answer = self.client.ask_agent(request).await.map_err(said)?.into_inner();
        let response = serde_json::from_str(&answer.response_json).with_context(|| {
            format!(
                "the answer of the agent on {node} cannot be read: has it another version than this program?"
            )
        })?;
        match response {
            Response::Error { message, .. } => bail!("the agent on {node}: {message}"),
            response => Ok(response),
        }
    }
}

/// What keyd said instead of an answer.
pub(crate) fn said(status: Status) -> anyhow::Error {
    anyhow!("keyd: {}", status.message())
}

/// `warren keyd-tunnel`: connects standard input and output with keyd's socket.
pub(crate) async fn tunnel(target: &Target) -> anyhow::Result<()> {
    let path = target.keyd_socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    let socket = tokio::net::UnixStream::connect(path)
        .await
        .with_context(|| format!("cannot connect to {}", path.display()))?;
    let (mut from, mut to) = socket.into_split();
    let (mut input, mut output) = (tokio::io::stdin(), tokio::io::stdout());
    // Whichever end closes first is the end of both.
    let done = tokio::select! {
        done = tokio::io::copy(&mut input, &mut to) => done,
        done = tokio::io::copy(&mut from, &mut output) => done,
    };
    match done {
        Ok(_) => Ok(()),
        Err(error) if is_end(&error) => Ok(()),
        Err(error) => Err(error).context("the connection to keyd broke"),
    }
}

/// A peer that closes while something is still on its way to it makes a write fail: that is an end like any other.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// The parts of the directory that the commands show.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) nodes: BTreeMap<NodeName, NodeRecord>,
    pub(crate) facts: BTreeMap<NodeName, NodeFacts>,
    pub(crate) identities: BTreeMap<IdentityId, Labels>,
    pub(crate) workloads: BTreeMap<IpAddr, WorkloadRecord>,
}

impl Directory {
    pub(crate) fn add(&mut self, record: Record) {
        match record {
            Record::Node(node) => {
                self.nodes.insert(node.name.clone(), node);
            }
            Record::NodeFacts(name, facts) => {
                self.facts.insert(name, facts);
            }
            Record::Identity(number, labels) => {
                self.identities.insert(number, labels);
            }
            Record::Workload(workload) => {
                self.workloads.insert(workload.ip, workload);
            }
            // Not asked for.
            Record::Selector(..) | Record::Members(..) | Record::Policy(..) => {}
        }
    }

    /// The records of a pod, one per address.
    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Vec<&WorkloadRecord> {
        self.workloads
            .values()
            .filter(|workload| workload.pod.namespace == namespace && workload.pod.name == name)
            .collect()
    }
}
