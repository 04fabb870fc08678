//! Counts what the kernel's stack drops in this node's network namespace, by the kernel's own reasons.

use std::{cell::RefCell, collections::HashMap, fs, os::unix::fs::MetadataExt as _, path::Path};

use warren_abi::{TraceValue, limits};

use crate::{
    Error,
    attach::Attacher,
    btf::Btf,
    maps::Maps,
    programs::{Programs, TRACER},
    sys,
};

const TYPES: &str = "/sys/kernel/btf/vmlinux";
const NAMESPACE: &str = "/proc/thread-self/ns/net";
const PREFIX: &str = "SKB_DROP_REASON_";
/// Not drops, or drops by programs at devices, which ours count themselves.
const IGNORED: [&str; 5] = [
    "SKB_NOT_DROPPED_YET",
    "SKB_CONSUMED",
    "SKB_DROP_REASON_TC_INGRESS",
    "SKB_DROP_REASON_TC_EGRESS",
    "",
];
const UNSPECIFIED: &str = "SKB_DROP_REASON_NOT_SPECIFIED";
const SYMBOLS: &str = "/proc/kallsyms";
/// What places that give no reason do. The others are called by their function.
const PLACES: [(&str, &str); 6] = [
    ("ip_error", "no-route"),
    ("dst_discard", "blackhole"),
    ("dst_discard_out", "blackhole"),
    ("ip6_pkt_discard", "no-route"),
    ("ip6_pkt_drop", "no-route"),
    ("ip6_pkt_prohibit", "no-route"),
];

/// Names of the kernel's drop reasons by number, and of the places that give none.
#[derive(Debug, Default)]
pub(crate) struct Reasons {
    named: Vec<(u32, String)>,
    /// Names of places that were looked up: the kernel's list of symbols is long.
    places: RefCell<HashMap<u64, String>>,
}

impl Reasons {
    /// The name of a number in our counters.
    pub(crate) fn name(&self, number: u32) -> String {
        if number == limits::STACK_REASONS - 1 {
            return "stack-other".into();
        }
        match self.named.iter().find(|(value, _)| *value == number) {
            Some((_, name)) => format!("stack-{name}"),
            None => format!("stack-{number}"),
        }
    }

    /// The names of places in the kernel's code.
    pub(crate) fn place_names(&self, places: &[u64]) -> Vec<String> {
        let mut known = self.places.borrow_mut();
        if places.iter().any(|place| !known.contains_key(place)) {
            let symbols = fs::read_to_string(SYMBOLS).unwrap_or_default();
            for place in places {
                known
                    .entry(*place)
                    .or_insert_with(|| place_name(&symbols, *place));
            }
        }
        places
            .iter()
            .filter_map(|place| known.get(place).cloned())
            .collect()
    }
}

/// The function that a place lies in: the last symbol before it.
fn place_name(symbols: &str, place: u64) -> String {
    let parsed = symbols.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        Some((address, words.nth(1)?))
    });
    let before = parsed.filter(|(address, _)| *address != 0 && *address <= place);
    let Some((_, symbol)) = before.max_by_key(|(address, _)| *address) else {
        return "stack-not-specified".into();
    };
    // Compilers split functions and append to their names.
    let function = symbol.split('.').next().unwrap_or(symbol);
    match PLACES.iter().find(|(name, _)| *name == function) {
        Some((_, meaning)) => format!("stack-{meaning}"),
        None => format!(
            "stack-{}",
            function.trim_matches('_').to_ascii_lowercase().replace('_', "-")
        ),
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
        if programs.is(TRACER, info.program)? {
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
        unspecified: number_of(UNSPECIFIED),
        ignored: IGNORED.map(number_of),
    };
    let reasons = named.iter().filter_map(|(value, name)| {
        let name = name.strip_prefix(PREFIX)?;
        Some((*value, name.to_ascii_lowercase().replace('_', "-")))
    });
    Some((
        value,
        Reasons {
            named: reasons.collect(),
            places: RefCell::default(),
        },
    ))
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
