//! A machine as bytes for a successor, which goes on where this one stopped.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use warren_model::{PreSharedKey, PublicKey};

use super::{
    super::{
        cookie::Authenticator,
        image::{Damaged, Reader, Writer},
        noise::Pending,
        own::{Index, Shared},
        session::{Receiving, Sending},
    },
    Attempt, Machine, OLD_SESSIONS, Session, or_zero,
};

impl Session {
    fn write(&self, out: &mut Writer) {
        self.sending.write(out);
        self.receiving.write(out);
        out.u64(self.counter);
        out.flag(self.initiator);
        out.u32(self.index.value);
    }

    fn read(shared: &Arc<Shared>, peer: u32, from: &mut Reader<'_>) -> Result<Self, Damaged> {
        let (sending, receiving) = (Sending::read(from)?, Receiving::read(from)?);
        let session = Self {
            sending: Arc::new(sending),
            receiving: Arc::new(receiving),
            counter: from.u64()?,
            initiator: from.flag()?,
            index: Index::restore(shared, from.u32()?, peer)?,
        };
        shared.establish(&session.index, &session.receiving);
        Ok(session)
    }
}

impl Attempt {
    fn write(&self, out: &mut Writer) {
        self.pending.write(out);
        out.u32(self.index.value);
        out.moment(self.began);
        out.moment(self.again_at);
        out.flag(self.hurried);
    }

    fn read(shared: &Arc<Shared>, peer: u32, from: &mut Reader<'_>) -> Result<Self, Damaged> {
        Ok(Self {
            pending: Pending::read(from)?,
            index: Index::restore(shared, from.u32()?, peer)?,
            began: from.moment()?,
            again_at: from.moment()?,
            hurried: from.flag()?,
        })
    }
}

fn moment(out: &mut Writer, moment: &Option<Instant>) {
    out.option(*moment, Writer::moment);
}

impl Machine {
    pub(super) fn write_image(&self, out: &mut Writer) {
        out.raw(or_zero(self.preshared_key.as_ref()));
        self.authenticator.write(out);
        out.option(self.attempt.as_ref(), |out, attempt| attempt.write(out));
        for session in [&self.current, &self.next] {
            out.option(session.as_ref(), |out, session| session.write(out));
        }
        out.count(self.old.len());
        for session in &self.old {
            session.write(out);
        }
        out.u64(self.handshakes);
        for at in [&self.last_initiation, &self.unanswered, &self.unacknowledged] {
            moment(out, at);
        }
        out.flag(self.stale);
    }

    /// What [`Self::write_image`] wrote.
    pub(in super::super) fn read(
        shared: &Arc<Shared>,
        peer: &PublicKey,
        index: u32,
        from: &mut Reader<'_>,
    ) -> Result<Self, Damaged> {
        let preshared_key = PreSharedKey::from_bytes(&*from.secret()?);
        let session = |from: &mut Reader<'_>| Session::read(shared, index, from);
        let mut machine = Self::new(Arc::clone(shared), peer, preshared_key.as_ref(), index);
        machine.authenticator = Authenticator::read(peer.as_bytes(), from)?;
        machine.attempt = from.option(|from| Attempt::read(shared, index, from))?;
        machine.current = from.option(session)?;
        machine.next = from.option(session)?;
        let old = from.count()?;
        if old > OLD_SESSIONS {
            return Err(Damaged);
        }
        machine.old = (0..old)
            .map(|_| session(from))
            .collect::<Result<VecDeque<_>, _>>()?;
        machine.handshakes = from.u64()?;
        machine.last_initiation = from.option(Reader::moment)?;
        machine.unanswered = from.option(Reader::moment)?;
        machine.unacknowledged = from.option(Reader::moment)?;
        machine.stale = from.flag()?;
        Ok(machine)
    }
}
