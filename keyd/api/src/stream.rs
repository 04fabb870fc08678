//! The agent's end of a session: send and receive, nothing more.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    MAX_MESSAGE_BYTES,
    proto::{AgentMessage, Hello, KeydMessage, agent_message, keyd_client::KeydClient, keyd_message},
};

/// An open stream to `keyd`. Dropping it ends the stream.
#[derive(Debug)]
pub struct AgentStream {
    out: mpsc::Sender<AgentMessage>,
    inbound: Streaming<KeydMessage>,
}

impl AgentStream {
    /// Opens the stream and says Hello. A refusal arrives as the first [`Self::receive`].
    pub async fn open(channel: Channel, hello: Hello) -> Result<Self, Status> {
        let (out, messages) = mpsc::channel(64);
        let first = AgentMessage {
            body: Some(agent_message::Body::Hello(hello)),
        };
        out.send(first)
            .await
            .map_err(|_| Status::internal("the stream's own queue is closed"))?;
        let inbound = KeydClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .session(ReceiverStream::new(messages))
            .await?
            .into_inner();
        Ok(Self { out, inbound })
    }

    /// Sends a message; false where the stream has ended.
    pub async fn send(&self, body: agent_message::Body) -> bool {
        self.out.send(AgentMessage { body: Some(body) }).await.is_ok()
    }

    /// A sender for other tasks.
    pub fn sender(&self) -> mpsc::Sender<AgentMessage> {
        self.out.clone()
    }

    /// The next message; `None` at the end of the stream. A refusal is the status's message.
    pub async fn receive(&mut self) -> Result<Option<keyd_message::Body>, Status> {
        loop {
            match self.inbound.message().await? {
                None => return Ok(None),
                Some(KeydMessage { body: Some(body) }) => return Ok(Some(body)),
                // A kind of message that this version does not know.
                Some(KeydMessage { body: None }) => {}
            }
        }
    }
}
