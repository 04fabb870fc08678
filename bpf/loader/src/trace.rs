//! Counts what the kernel's stack drops in this node's network namespace, by the kernel's own reasons.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use warren_abi::{TraceValue, limits};

use crate::{
    Error,
    attach::{Attacher, attached_program},
    btf::Btf,
    maps::Maps,
    programs::{Programs, TRACER},
    sys,
};

const TYPES: &str = "/sys/kernel/btf/vmlinux";
const NAMESPACE: &str = "/proc/thread-self/ns/net";
const PREFIX: &str = "SKB_DROP_REASON_";
/// Not drops, or drops by programs at devices, which ours count themselves.
const IGNORED: [&str; 6] = [
    "SKB_NOT_DROPPED_YET",
    "SKB_CONSUMED",
    "SKB_DROP_REASON_TC_INGRESS",
    "SKB_DROP_REASON_TC_EGRESS",
    "",
    "",
];

/// Names of the kernel's drop reasons, by number.
#[derive(Debug, Default)]
pub(crate) struct Reasons(Vec<(u32, String)>);

impl Reasons {
    /// The name of a number in our counters.
    pub(crate) fn name(&self, number: u32) -> String {
        if number == limits::STACK_REASONS - 1 {
            return "stack-other".into();
        }
        match self.0.iter().find(|(value, _)| *value == number) {
            Some((_, name)) => format!("stack-{name}"),
            None => format!("stack-{number}"),
        }
    }
}

/// Starts to count, or finds that it is done already. Where the kernel does not describe its types, a warning
/// is logged and nothing is counted.
pub(crate) fn start(
    maps: &mut Maps,
    programs: &Programs,
    attacher: &Attacher,
    links: &Path,
) -> Result<Reasons, Error> {
    let Some((value, reasons)) = describe_kernel()? else {
        tracing::warn!("{TYPES} is absent or incomplete: drops by the kernel's stack are not counted");
        return Ok(Reasons::default());
    };
    if maps.trace.get()? != value {
        maps.trace.set(value)?;
    }
    attach(programs, attacher, links)?;
    Ok(reasons)
}

fn attach(programs: &Programs, attacher: &Attacher, links: &Path) -> Result<(), Error> {
    let path = links.join(TRACER);
    let pinned = sys::open_pin(&path).map_err(|source| Error::Io {
        path: path.clone(),
        source,
    })?;
    if let Some(link) = pinned {
        let info = sys::link_info(&link).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        if attached_program(info.program)? == Some(programs.info(TRACER)?) {
            return Ok(());
        }
    }
    let link =
        sys::raw_tracepoint_attach(programs.fd(TRACER)?, c"kfree_skb").map_err(|source| Error::Kernel {
            operation: "attaching to the tracepoint skb:kfree_skb".into(),
            source,
        })?;
    attacher.pin_over(&link, &path)
}

/// Where the members are in this kernel, and its names of reasons; `None` where it does not say.
fn describe_kernel() -> Result<Option<(TraceValue, Reasons)>, Error> {
    let Ok(bytes) = fs::read(TYPES) else {
        return Ok(None);
    };
    let namespace = fs::metadata(NAMESPACE).map_err(|source| Error::Io {
        path: NAMESPACE.into(),
        source,
    })?;
    Ok(Btf::parse(&bytes).and_then(|btf| find(&btf, namespace.ino())))
}

fn find(btf: &Btf<'_>, namespace: u64) -> Option<(TraceValue, Reasons)> {
    let named = btf.values("skb_drop_reason")?;
    let number_of = |name: &str| {
        named
            .iter()
            .find(|(_, found)| *found == name)
            .map_or(0, |(value, _)| *value)
    };
    let value = TraceValue {
        netns: namespace.try_into().ok()?,
        skb_dev: btf.offset("sk_buff", &["dev"])?,
        skb_sk: btf.offset("sk_buff", &["sk"])?,
        dev_net: btf.offset("net_device", &["nd_net", "net"])?,
        sock_net: btf.offset("sock", &["__sk_common", "skc_net", "net"])?,
        net_inum: btf.offset("net", &["ns", "inum"])?,
        ignored: IGNORED.map(number_of),
    };
    let reasons = named.iter().filter_map(|(value, name)| {
        let name = name.strip_prefix(PREFIX)?;
        Some((*value, name.to_ascii_lowercase().replace('_', "-")))
    });
    Some((value, Reasons(reasons.collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_kernel() {
        let (value, reasons) = describe_kernel().unwrap().expect("the kernel has BTF");
        assert_ne!(value.netns, 0);
        assert_eq!(reasons.name(2), "stack-not-specified");
        assert_eq!(reasons.name(limits::STACK_REASONS - 1), "stack-other");
        assert_eq!(Reasons::default().name(2), "stack-2");
        assert!(value.ignored.iter().filter(|number| **number != 0).count() >= 2);
    }
}
