//! Programs as filters of a clsact qdisc, for kernels without TCX. Filters have no links and nothing to pin:
//! they stay with the device until somebody removes them, and are found again by their name and handle.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use crate::{
    netlink::{ACK, CREATE, DUMP, EXCLUSIVE, Message, REQUEST, attribute, attributes, exchange},
    sys::{Direction, is_no_device},
};

const NEW_QDISC: u16 = 36;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;

const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const BPF_FD: u16 = 6;
const BPF_NAME: u16 = 7;
const BPF_FLAGS: u16 = 8;
const BPF_ID: u16 = 11;
const DIRECT_ACTION: u32 = 1;

const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// The first there is: programs of others come behind ours.
const PRIORITY: u32 = 1;
const ALL_PROTOCOLS: u16 = 0x0003;
/// Our filters. Two, as a filter that is no longer first is replaced by one that is before it goes.
const HANDLES: [u32; 2] = [0x5752_0001, 0x5752_0002];
/// Names of our filters start with this.
const NAME_PREFIX: &str = "warren_";

/// A filter of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filter {
    handle: u32,
    /// Id of its program.
    pub(crate) program: u32,
    /// It runs before all others.
    pub(crate) first: bool,
}

fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => 0xffff_fff2,
        Direction::Egress => 0xffff_fff3,
    }
}

/// `struct tcmsg`.
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, ifindex, handle, parent, info]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

fn filter_info(priority: u32) -> u32 {
    (priority << 16) | u32::from(ALL_PROTOCOLS.to_be())
}

/// Filters of ours at a hook, in the order in which they run.
pub(crate) fn filters(ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let message = Message::new(
        GET_FILTER,
        REQUEST | DUMP,
        &tcmsg(ifindex, 0, parent(direction), 0),
    );
    let answers = match exchange(message) {
        Ok(answers) => answers,
        // No device or no qdisc: no filter.
        Err(error) if is_no_device(&error) || error.raw_os_error() == Some(libc::EINVAL) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    // Each priority also reports itself, with handle 0.
    let real = answers
        .iter()
        .filter(|body| body.len() >= 20 && word(body, 8) != 0);
    for (position, body) in real.enumerate() {
        if let Some((name, program)) = describe(&body[20..])
            && name.starts_with(NAME_PREFIX)
            && HANDLES.contains(&word(body, 8))
        {
            found.push(Filter {
                handle: word(body, 8),
                program,
                first: position == 0,
            });
        }
    }
    Ok(found)
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

/// Name and program id of an eBPF filter.
fn describe(bytes: &[u8]) -> Option<(String, u32)> {
    let (_, options) = attributes(bytes).find(|(kind, _)| *kind == OPTIONS)?;
    let (_, name) = attributes(options).find(|(kind, _)| *kind == BPF_NAME)?;
    let (_, id) = attributes(options).find(|(kind, _)| *kind == BPF_ID)?;
    let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
    Some((name, u32::from_ne_bytes(id.try_into().ok()?)))
}

/// Makes a program the only filter of ours at a hook, and the first of all. One that is there already is
/// replaced at one moment; one that is not first stays until another is.
pub(crate) fn attach(ifindex: u32, direction: Direction, program: impl AsFd, name: &str) -> io::Result<()> {
    add_qdisc(ifindex)?;
    let present = filters(ifindex, direction)?;
    let handle = match present.first() {
        Some(filter) if filter.first => filter.handle,
        Some(filter) if filter.handle == HANDLES[0] => HANDLES[1],
        _ => HANDLES[0],
    };
    set_filter(ifindex, direction, handle, program, name)?;
    for filter in present.iter().filter(|filter| filter.handle != handle) {
        delete(ifindex, direction, filter.handle)?;
    }
    Ok(())
}

/// Removes all filters of ours from a hook.
pub(crate) fn detach(ifindex: u32, direction: Direction) -> io::Result<()> {
    for filter in filters(ifindex, direction)? {
        delete(ifindex, direction, filter.handle)?;
    }
    Ok(())
}

fn add_qdisc(ifindex: u32) -> io::Result<()> {
    let body = tcmsg(ifindex, CLSACT_HANDLE, CLSACT, 0);
    let message =
        Message::new(NEW_QDISC, REQUEST | ACK | CREATE | EXCLUSIVE, &body).attribute(KIND, b"clsact\0");
    match exchange(message) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn set_filter(
    ifindex: u32,
    direction: Direction,
    handle: u32,
    program: impl AsFd,
    name: &str,
) -> io::Result<()> {
    let options = [
        attribute(BPF_FD, &program.as_fd().as_raw_fd().to_ne_bytes()),
        attribute(BPF_NAME, format!("{NAME_PREFIX}{name}\0").as_bytes()),
        attribute(BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes()),
    ]
    .concat();
    let body = tcmsg(ifindex, handle, parent(direction), filter_info(PRIORITY));
    let message = Message::new(NEW_FILTER, REQUEST | ACK | CREATE, &body)
        .attribute(KIND, b"bpf\0")
        .attribute(OPTIONS, &options);
    exchange(message).map(drop)
}

fn delete(ifindex: u32, direction: Direction, handle: u32) -> io::Result<()> {
    let body = tcmsg(ifindex, handle, parent(direction), filter_info(PRIORITY));
    let message = Message::new(DELETE_FILTER, REQUEST | ACK, &body).attribute(KIND, b"bpf\0");
    match exchange(message) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_no_device(&error) => Ok(()),
        Err(error) => Err(error),
    }
}
