//! Connection tracking: which flow a packet belongs to, and whether policy allows it.

use warren_abi::{
    DropReason, FLOW_AUDIT, FLOW_EGRESS, FLOW_JUDGED, FLOW_REPLY, FlowKey, FlowState, FlowValue, Outcome,
};

use crate::{
    Maps, Scratch, Step, events,
    maps::{Table, is_pod, is_service},
    policy::{Answer, judge},
    quote,
    state::{self, Look, Standing},
};

/// An endpoint holds to its limit of flows while the agent collected within this time, in seconds.
const COLLECTS: u32 = 120;

/// What lets a packet in that answers a flow which is not judged on this tuple.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Replies {
    /// Nothing.
    #[default]
    Judged,
    /// The flow itself: who notes it judged it on another tuple.
    Noted,
    /// An address that this node's stack translated; or policy, asked about the address that the packet shows.
    Translated,
}

/// What is done with a packet for one endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Task {
    /// Nothing.
    #[default]
    Nothing,
    /// It is judged: by its flow, as related to one, or by policy.
    Judge,
    /// It was judged on another tuple: the flow is noted.
    Note,
    /// It may answer a flow that was noted so: then nothing else is done.
    Recognise,
}

/// From whose point of view a packet is judged.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Way {
    /// Identity of the endpoint.
    pub(crate) identity: u32,
    /// Where the peer's packets come from, see [`FlowValue::peer_mark`].
    pub(crate) peer_mark: u32,
    /// Number of the endpoint, 0 = the host.
    pub(crate) endpoint: u16,
    /// What to do.
    pub(crate) task: Task,
    /// What lets a reply in.
    pub(crate) replies: Replies,
    /// The packet leaves the endpoint.
    pub(crate) outbound: bool,
    /// The destination may be translated: note the flow, do not judge it.
    pub(crate) defer: bool,
}

/// What became of a packet that passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracked {
    /// It belongs to a flow that policy allows.
    Judged,
    /// It is to be judged elsewhere.
    Deferred,
}

/// Carries out what was planned for the packet (`scratch.ways`). `true`: the first judged it.
#[inline(always)]
pub(crate) fn carry_out<M: Maps>(maps: &M, scratch: &mut Scratch) -> Result<bool, DropReason> {
    // Through memory, so that the verifier does not follow what comes then for each answer.
    scratch.judged = false;
    if scratch.ways[0].task != Task::Nothing {
        scratch.way = scratch.ways[0];
        let tracked = perform(maps, scratch)?;
        scratch.judged = tracked == Tracked::Judged;
    }
    let recognised = scratch.judged && scratch.ways[0].task == Task::Recognise;
    if scratch.ways[1].task != Task::Nothing && !recognised {
        scratch.way = scratch.ways[1];
        perform(maps, scratch)?;
    }
    Ok(scratch.judged)
}

/// Carries out `scratch.way`.
///
/// A function of its own in the kernel too, as are those that it calls: the stack holds 512 bytes for all of them. Each
/// is called at one place, as the verifier follows every call anew.
#[inline(never)]
fn perform<M: Maps>(maps: &M, scratch: &mut Scratch) -> Result<Tracked, DropReason> {
    if scratch.tuple.error && quote::key(scratch) && is_related(maps, scratch) {
        return Ok(Tracked::Judged);
    }
    if scratch.way.task == Task::Recognise {
        return Ok(if is_noted(maps, scratch) {
            Tracked::Judged
        } else {
            Tracked::Deferred
        });
    }
    match track(maps, scratch) {
        // Where there is no room to note it, whoever asks later is judged by policy.
        Ok(_) | Err(_) if scratch.way.task == Task::Note => Ok(Tracked::Deferred),
        tracked => tracked,
    }
}

/// The flow of a packet, and the verdict.
///
/// What is noted only has no policy to be asked.
#[inline(never)]
fn track<M: Maps>(maps: &M, scratch: &mut Scratch) -> Result<Tracked, DropReason> {
    ask(scratch);
    key(scratch);
    examine(maps, scratch);
    if scratch.entry.seen {
        let deferred = scratch.way.defer && state::is_forward(scratch.value.flags, scratch.way.outbound);
        return Ok(if deferred {
            Tracked::Deferred
        } else {
            Tracked::Judged
        });
    }
    let Some(state) = maps.flow_state() else {
        return Err(DropReason::NotConfigured);
    };
    // Before any question: what was asked while policy changed is asked again.
    scratch.revision = state.revision;
    if scratch.entry.there && judged_again(maps, scratch)? {
        return Ok(Tracked::Judged);
    }
    if scratch.way.defer {
        if opens(scratch, state) {
            create(maps, scratch, 0, state)?;
        }
        return Ok(Tracked::Deferred);
    }
    ask(scratch);
    judge(maps, scratch);
    let audited = settle(maps, scratch)?;
    let waiting = matches!(scratch.entry.standing, Standing::Waiting) && goes_on(scratch.tuple.step);
    if !opens(scratch, state) && !waiting {
        return Ok(Tracked::Judged);
    }
    create(
        maps,
        scratch,
        FLOW_JUDGED | if audited { FLOW_AUDIT } else { 0 },
        state,
    )?;
    if !audited {
        events::report(maps, scratch, Outcome::Allowed, 0);
    }
    Ok(Tracked::Judged)
}

/// What is known of the flow of a packet.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Entry {
    table: Table,
    standing: Standing,
    /// There is one, whatever it is worth.
    there: bool,
    /// The packet was noted as one of the flow: nothing is to be asked.
    seen: bool,
}

/// Looks for the flow of a packet, and notes the packet where that is all there is to do. The answer goes through
/// memory: so the verifier does not follow what comes then for each way by itself.
#[inline(never)]
fn examine<M: Maps>(maps: &M, scratch: &mut Scratch) {
    scratch.entry.standing = Standing::Fresh;
    scratch.entry.seen = false;
    let (table, flow) = find(maps, &scratch.key);
    scratch.entry.table = table;
    scratch.entry.there = flow.is_some();
    let (Some(flow), Some(state)) = (flow, maps.flow_state()) else {
        return;
    };
    let way = scratch.way;
    scratch.value = flow.load();
    let standing = state::standing(&scratch.value, &look(scratch, state.revision));
    scratch.entry.standing = standing;
    let forward = state::is_forward(scratch.value.flags, way.outbound);
    let seen = match standing {
        Standing::Current => true,
        Standing::Waiting => way.defer,
        Standing::Stale => way.defer && forward,
        Standing::Untranslated => is_let_in(maps, scratch, state),
        Standing::Fresh => false,
    };
    if seen {
        touch(maps, scratch, table, &flow);
        scratch.entry.seen = true;
    }
}

/// Whether a packet answers a flow that was noted.
#[inline(never)]
fn is_noted<M: Maps>(maps: &M, scratch: &mut Scratch) -> bool {
    key(scratch);
    match find(maps, &scratch.key) {
        (table, Some(flow)) => {
            scratch.value = flow.load();
            let noted = matches!(
                state::standing(&scratch.value, &look(scratch, 0)),
                Standing::Untranslated
            );
            if noted {
                touch(maps, scratch, table, &flow);
            }
            noted
        }
        (_, None) => false,
    }
}

/// Prepares the question about the packet at hand.
#[inline(always)]
fn ask(scratch: &mut Scratch) {
    let way = scratch.way;
    let asked = &mut scratch.asked;
    asked.endpoint = way.endpoint;
    asked.direction = events::direction(way.outbound);
    asked.outbound = way.outbound;
    asked.own = way.identity;
    asked.peer = 0;
    asked.rule = 0;
    asked.from = way.peer_mark;
    asked.port = scratch.tuple.port;
}

/// The key of the packet as the endpoint sees it.
#[inline(always)]
fn key(scratch: &mut Scratch) {
    let way = scratch.way;
    let (tuple, key) = (&scratch.tuple, &mut scratch.key);
    key.endpoint = way.endpoint;
    key.protocol = tuple.protocol;
    key.family = tuple.family;
    if way.outbound {
        key.local = tuple.source;
        key.local_port = tuple.source_port;
        key.remote = tuple.destination;
        key.remote_port = tuple.destination_port;
    } else {
        key.local = tuple.destination;
        key.local_port = tuple.destination_port;
        key.remote = tuple.source;
        key.remote_port = tuple.source_port;
    }
}

#[inline(always)]
fn find<M: Maps>(maps: &M, key: &FlowKey) -> (Table, Option<M::Flow>) {
    match maps.flow(Table::Established, key) {
        Some(flow) => (Table::Established, Some(flow)),
        None => (Table::New, maps.flow(Table::New, key)),
    }
}

#[inline(always)]
fn look(scratch: &Scratch, revision: u32) -> Look {
    Look {
        outbound: scratch.way.outbound,
        step: scratch.tuple.step,
        from: Some(scratch.way.peer_mark),
        now: scratch.now.seconds,
        revision,
    }
}

/// The packet opens a flow.
#[inline(always)]
fn opens(scratch: &Scratch, state: &FlowState) -> bool {
    match scratch.tuple.step {
        Step::Open | Step::Any => true,
        Step::Continue | Step::Finish => scratch.now.seconds < state.adopt_until,
        Step::Answer | Step::Reset => false,
    }
}

#[inline(always)]
const fn goes_on(step: Step) -> bool {
    matches!(step, Step::Continue | Step::Finish)
}

/// Whether a reply to a flow that is not judged on this tuple may pass without a question.
#[inline(always)]
fn is_let_in<M: Maps>(maps: &M, scratch: &Scratch, state: &FlowState) -> bool {
    match scratch.way.replies {
        Replies::Judged => false,
        Replies::Noted => true,
        Replies::Translated => is_translated(maps, scratch, state),
    }
}

/// Whether the packet's source is an address that this node's stack put there: no pod and no peer could, as
/// `from_pod` and `tun_in` bind them to their own, and no service's address comes from outside.
#[inline(always)]
fn is_translated<M: Maps>(maps: &M, scratch: &Scratch, state: &FlowState) -> bool {
    let source = scratch.remote();
    let marked = scratch.now.from == scratch.now.tunnel_mark || scratch.is_from_endpoint();
    if is_service(maps, &source) {
        return true;
    }
    match maps.node(&source) {
        Some(node) if node.own != 0 => {
            marked || (scratch.now.ingress_ifindex == 0 && is_node_port(state, scratch.key.remote_port))
        }
        Some(_) => false,
        None => marked && !is_pod(maps, &source) && maps.owner(&source).is_none(),
    }
}

#[inline(always)]
fn is_node_port(state: &FlowState, port: [u8; 2]) -> bool {
    in_range(state.node_ports, port)
}

/// The port is one of `first << 16 | last`; 0 = none is.
#[inline(always)]
pub(crate) fn in_range(range: u32, port: [u8; 2]) -> bool {
    let port = u32::from(u16::from_be_bytes(port));
    range != 0 && port >= range >> 16 && port <= range & 0xffff
}

/// Notes a packet of a flow that goes on; the first reply moves it where nothing is evicted.
#[inline(always)]
fn touch<M: Maps>(maps: &M, scratch: &mut Scratch, table: Table, flow: &M::Flow) {
    let before = scratch.value;
    let outbound = scratch.way.outbound;
    step(scratch, outbound);
    let value = scratch.value;
    // Tried again once a second where there was no room.
    let moves = table == Table::New
        && value.flags & FLOW_REPLY != 0
        && (before.flags & FLOW_REPLY == 0 || before.last_seen != value.last_seen);
    if moves && moved(maps, scratch) {
        return;
    }
    flow.touch(value.last_seen, value.flags, value.lifetime);
}

/// Moves a flow to where nothing is evicted.
#[inline(always)]
fn moved<M: Maps>(maps: &M, scratch: &Scratch) -> bool {
    let moved = maps.insert_flow(Table::Established, &scratch.key, &scratch.value);
    if moved {
        maps.remove_flow(Table::New, &scratch.key);
    }
    moved
}

/// The value after the packet.
#[inline(always)]
fn step(scratch: &mut Scratch, outbound: bool) {
    let flags = state::advance(scratch.value.flags, scratch.tuple.step, outbound);
    scratch.value.flags = flags;
    scratch.value.lifetime = state::lifetime(scratch.key.protocol, flags);
    scratch.value.last_seen = scratch.now.seconds;
}

/// Judges a flow whose judgement is old, or that was not judged on this tuple, in the direction that it was opened.
/// `false`: there is no such flow, or it was never judged and this packet is to be judged for itself.
#[inline(always)]
fn judged_again<M: Maps>(maps: &M, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let untranslated = match scratch.entry.standing {
        Standing::Stale => false,
        Standing::Untranslated if scratch.way.replies == Replies::Translated => true,
        Standing::Untranslated | Standing::Current | Standing::Waiting | Standing::Fresh => return Ok(false),
    };
    ask_again(scratch);
    judge(maps, scratch);
    if untranslated && matches!(scratch.answer, Answer::Denied(_)) {
        return Ok(false);
    }
    // What is denied stays as it was: the next packet asks again, in the same direction.
    let audited = settle(maps, scratch)?;
    let outbound = scratch.asked.outbound;
    scratch.value.flags =
        (scratch.value.flags & !FLOW_AUDIT) | FLOW_JUDGED | if audited { FLOW_AUDIT } else { 0 };
    scratch.value.revision = scratch.revision;
    scratch.value.rule = scratch.asked.rule;
    scratch.value.peer = scratch.asked.peer;
    step(scratch, outbound);
    let moves = scratch.entry.table == Table::New && scratch.value.flags & FLOW_REPLY != 0;
    if (moves && moved(maps, scratch)) || maps.insert_flow(scratch.entry.table, &scratch.key, &scratch.value)
    {
        Ok(true)
    } else {
        Err(DropReason::FlowTable)
    }
}

/// Prepares the question about a flow that was opened before.
#[inline(always)]
fn ask_again(scratch: &mut Scratch) {
    scratch.asked.direction = events::direction(scratch.value.flags & FLOW_EGRESS != 0);
    scratch.asked.from = scratch.value.peer_mark;
    scratch.asked.port = scratch.value.port;
}

/// Turns the answer into passing (`true`: audited) or a reason to drop.
#[inline(always)]
fn settle<M: Maps>(maps: &M, scratch: &mut Scratch) -> Result<bool, DropReason> {
    match scratch.answer {
        Answer::Allowed => Ok(false),
        Answer::Audited(reason) => {
            events::report(maps, scratch, Outcome::Audited, reason as u8);
            Ok(true)
        }
        Answer::Denied(reason) => Err(reason),
    }
}

/// Stores the flow that the packet opens; without [`FLOW_JUDGED`] one that is judged elsewhere.
#[inline(always)]
fn create<M: Maps>(maps: &M, scratch: &mut Scratch, flags: u8, state: &FlowState) -> Result<(), DropReason> {
    let there = scratch.entry.there;
    let endpoint = scratch.key.endpoint;
    let now = scratch.now.seconds;
    let collects = now.saturating_sub(state.collected) <= COLLECTS && state.collected != 0;
    if !there && collects && state.limit != 0 && maps.flow_count(endpoint) >= state.limit {
        return Err(DropReason::FlowLimit);
    }
    let outbound = scratch.asked.outbound;
    scratch.value = FlowValue {
        created: now,
        revision: scratch.revision,
        rule: scratch.asked.rule,
        peer: scratch.asked.peer,
        peer_mark: scratch.asked.from,
        port: scratch.asked.port,
        flags: flags | if outbound { FLOW_EGRESS } else { 0 },
        ..FlowValue::default()
    };
    step(scratch, outbound);
    if !maps.insert_flow(scratch.entry.table, &scratch.key, &scratch.value) {
        return Err(DropReason::FlowTable);
    }
    if !there {
        maps.add_flow(endpoint);
    }
    Ok(())
}

/// Whether the packet that an ICMP error quotes (`scratch.key`) belongs to a flow that policy allows. The flow is left as
/// it was.
#[inline(never)]
fn is_related<M: Maps>(maps: &M, scratch: &mut Scratch) -> bool {
    let way = scratch.way;
    ask(scratch);
    let Some(revision) = maps.flow_state().map(|state| state.revision) else {
        return false;
    };
    let (_, flow) = find(maps, &scratch.key);
    let Some(flow) = flow else { return false };
    scratch.value = flow.load();
    // The quoted packet went the other way.
    let look = Look {
        outbound: !way.outbound,
        step: Step::Continue,
        from: None,
        now: scratch.now.seconds,
        revision,
    };
    match state::standing(&scratch.value, &look) {
        Standing::Current => true,
        Standing::Fresh => false,
        Standing::Waiting | Standing::Untranslated if way.replies == Replies::Noted => true,
        Standing::Waiting | Standing::Untranslated if way.replies == Replies::Judged => false,
        Standing::Waiting | Standing::Untranslated if is_service(maps, &scratch.remote()) => true,
        Standing::Waiting | Standing::Untranslated | Standing::Stale => {
            ask_again(scratch);
            judge(maps, scratch);
            match scratch.answer {
                Answer::Allowed | Answer::Audited(_) => true,
                Answer::Denied(_) => false,
            }
        }
    }
}
