//! A peer as bytes for a successor: its settings, which are written while packets flow, and the rest, which is written
//! when they no longer do.

use std::{sync::atomic::Ordering, time::Duration};

use warren_model::{PreSharedKey, PublicKey};

use super::{
    super::{
        image::{Damaged, Reader, Writer},
        session::REJECT_AFTER_TIME,
        transport::Identity,
    },
    BUFFER, Inner, Peer, QUEUE, Transport,
};

impl Peer {
    /// Writes what configuration requests change.
    pub(in super::super) fn write_settings(&self, out: &mut Writer) {
        let inner = self.lock();
        out.raw(self.key.as_bytes());
        out.u32(self.index);
        out.option(inner.preshared_key.as_ref(), |out, key| out.raw(key.expose()));
        out.u16(inner.keepalive_seconds);
    }

    /// What [`Self::write_settings`] wrote; the peer has no transport yet.
    pub(in super::super) fn read_settings(from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let key = PublicKey::from_bytes(from.array()?).map_err(|_| Damaged)?;
        let peer = Self::new(key, from.u32()?, None);
        {
            let mut inner = peer.lock();
            inner.preshared_key = from
                .option(|from| from.secret())?
                .and_then(|key| PreSharedKey::from_bytes(&key));
            inner.keepalive_seconds = from.u16()?;
        }
        Ok(peer)
    }

    /// Writes where the peer is, its sessions and what waits. Nothing may be sealed or opened for it afterwards, unless
    /// nobody reads this.
    pub(in super::super) fn write_sessions(&self, out: &mut Writer) {
        let inner = self.lock();
        out.u64(self.received.load(Ordering::Relaxed));
        out.u64(self.sent.load(Ordering::Relaxed));
        out.option(inner.endpoint, Writer::endpoint);
        out.moment(inner.last_traffic);
        out.option(inner.last_handshake, Writer::time);
        out.u64(inner.handshakes);
        out.count(inner.queue.len());
        for message in &inner.queue {
            out.bytes(message);
        }
        for transport in [&inner.transport, &inner.previous] {
            write_transport(transport.as_deref(), out);
        }
    }

    /// What [`Self::write_sessions`] wrote. `same`: the writer spoke the protocol by the same implementation, so that its
    /// sessions can be gone on with. Whether new ones are due instead.
    pub(in super::super) fn read_sessions(
        &self,
        identity: Option<&dyn Identity>,
        same: bool,
        from: &mut Reader<'_>,
    ) -> Result<bool, Damaged> {
        let inner = &mut *self.lock();
        self.received.store(from.u64()?, Ordering::Relaxed);
        self.sent.store(from.u64()?, Ordering::Relaxed);
        inner.endpoint = from.option(Reader::endpoint)?;
        inner.last_traffic = from.moment()?;
        inner.last_handshake = from.option(Reader::time)?;
        inner.handshakes = from.u64()?;
        let waiting = from.count()?;
        if waiting > QUEUE {
            return Err(Damaged);
        }
        for _ in 0..waiting {
            let message = from.bytes()?;
            if message.len() > BUFFER {
                return Err(Damaged);
            }
            inner.queue.push_back(message.to_vec());
        }
        let transport = self.read_transport(identity, same, from)?;
        inner.previous = self.read_transport(identity, same, from)?;
        let lost = transport.is_none() && had_session(inner);
        match (transport, identity) {
            (None, Some(_)) => self.renew(inner, identity),
            (transport, _) => inner.transport = transport,
        }
        Ok(lost)
    }

    fn read_transport(
        &self,
        identity: Option<&dyn Identity>,
        same: bool,
        from: &mut Reader<'_>,
    ) -> Result<Option<Box<dyn Transport>>, Damaged> {
        let image = from.option(Reader::section)?;
        match (image, identity) {
            (Some(mut image), Some(identity)) if same => {
                let transport = identity.restore(&self.key, self.index, &mut image)?;
                image.end()?;
                Ok(Some(transport))
            }
            _ => Ok(None),
        }
    }
}

/// A transport, or nothing where its sessions cannot be taken out.
fn write_transport(transport: Option<&dyn Transport>, out: &mut Writer) {
    let Some(transport) = transport else {
        return out.flag(false);
    };
    let mut image = out.beside();
    match transport.write(&mut image) {
        true => {
            out.flag(true);
            out.bytes(&image.finish());
        }
        false => out.flag(false),
    }
}

/// Whether the peer may still have a session with us.
fn had_session(inner: &Inner) -> bool {
    inner
        .last_handshake
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|age: Duration| age < REJECT_AFTER_TIME)
}
