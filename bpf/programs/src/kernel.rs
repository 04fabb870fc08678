//! The kernel's side: the packet and the maps behind the traits of the library, and the counters.

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::{bpf_ktime_get_ns, bpf_probe_read_kernel},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie::Key},
    programs::{RawTracePointContext, sk_buff::SkBuff},
};
use warren_abi::{
    Cidr4Key, Cidr6Key, DeviceValue, DropReason, EndpointValue, Event, FlowKey, FlowState, FlowValue,
    FragmentKey, FragmentValue, Hook, MarkValue, NodeKey, NodeValue, OwnerValue, PathValue, PolicyValue,
    PortKey, PortValue, RepeatKey, RepeatValue, SettingsValue, TraceValue, VerdictKey, VerdictValue, limits,
};
use warren_programs::{Address, FlowCells, Maps, Meta, Packet, RepeatCells, Scratch, Table};

#[map]
static SETTINGS: Array<SettingsValue> = Array::with_max_entries(1, 0);
#[map]
static DEVICES: HashMap<u32, DeviceValue> = HashMap::with_max_entries(limits::DEVICES, BPF_F_NO_PREALLOC);
#[map]
static ENDPOINTS: HashMap<u32, EndpointValue> =
    HashMap::with_max_entries(limits::ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static IDENTITIES: HashMap<u32, MarkValue> = HashMap::with_max_entries(limits::ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static OWNERS4: LpmTrie<[u8; 4], OwnerValue> = LpmTrie::with_max_entries(limits::OWNERS, 0);
#[map]
static OWNERS6: LpmTrie<[u8; 16], OwnerValue> = LpmTrie::with_max_entries(limits::OWNERS, 0);
#[map]
static PATHS: HashMap<u32, PathValue> = HashMap::with_max_entries(limits::PATHS, BPF_F_NO_PREALLOC);
#[map]
static POOLS4: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(limits::POOLS, 0);
#[map]
static POOLS6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(limits::POOLS, 0);
#[map]
static NODES: HashMap<NodeKey, NodeValue> = HashMap::with_max_entries(limits::NODES, BPF_F_NO_PREALLOC);
#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(limits::HOOKS * limits::REASONS, 0);
#[map]
static TRACE: Array<TraceValue> = Array::with_max_entries(1, 0);
#[map]
static STACK_DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(limits::STACK_REASONS, 0);
#[map]
static STACK_SITES: PerCpuHashMap<u64, u64> =
    PerCpuHashMap::with_max_entries(limits::STACK_SITES, BPF_F_NO_PREALLOC);
#[map]
static POLICY_ENDPTS: HashMap<u16, PolicyValue> =
    HashMap::with_max_entries(limits::POLICY_ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_PORTS: LpmTrie<PortKey, PortValue> = LpmTrie::with_max_entries(limits::POLICY_PORTS, 0);
#[map]
static POLICY_VERDICT: HashMap<VerdictKey, VerdictValue> =
    HashMap::with_max_entries(limits::POLICY_VERDICTS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_CIDRS4: LpmTrie<Cidr4Key, u32> = LpmTrie::with_max_entries(limits::POLICY_CIDRS, 0);
#[map]
static POLICY_CIDRS6: LpmTrie<Cidr6Key, u32> = LpmTrie::with_max_entries(limits::POLICY_CIDRS, 0);
#[map]
static FLOWS: HashMap<FlowKey, FlowValue> = HashMap::with_max_entries(limits::FLOWS, BPF_F_NO_PREALLOC);
#[map]
static FLOWS_NEW: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(limits::FLOWS_NEW, 0);
#[map]
static FLOW_COUNTS: Array<u32> = Array::with_max_entries(limits::POLICY_ENDPOINTS, 0);
#[map]
static FLOW_STATE: Array<FlowState> = Array::with_max_entries(1, 0);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(limits::EVENTS, 0);
#[map]
static EVENT_REPEATS: LruHashMap<RepeatKey, RepeatValue> =
    LruHashMap::with_max_entries(limits::EVENT_REPEATS, 0);
#[map]
static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Memory of the program that runs on this CPU: nothing interrupts one by another.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// The memory of this program.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the verifier knows that the pointer is to a whole value; the entry is this CPU's own, and a program has
    // it until it ends. Any bytes in it are those of a value: zero, or what a program before left.
    SCRATCH.get_ptr_mut(0).map(|pointer| unsafe { &mut *pointer })
}

/// A packet in the kernel.
pub(crate) struct Skb<'a>(pub(crate) &'a SkBuff);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset).ok()
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.0.len() as usize
    }

    /// Through the packet's control block, which is ours while the program runs: what is read from there can be
    /// anything.
    #[inline(always)]
    fn forget(&self, number: usize) -> usize {
        // SAFETY: the context is a valid `__sk_buff` while the program runs.
        unsafe {
            let place = &raw mut (*self.0.skb).cb[0];
            place.write_volatile(number as u32);
            place.read_volatile() as usize
        }
    }
}

/// What the kernel says about a packet.
#[inline(always)]
pub(crate) fn meta(ctx: &SkBuff) -> Meta {
    // SAFETY: the context is a valid `__sk_buff` while the program runs.
    let skb = unsafe { &*ctx.skb };
    Meta {
        ifindex: skb.ifindex,
        ingress_ifindex: skb.ingress_ifindex,
        mark: skb.mark,
        protocol: u16::from_be(skb.protocol as u16),
        tagged: skb.vlan_present != 0,
    }
}

/// The maps of the node.
pub(crate) struct KernelMaps;

impl Maps for KernelMaps {
    type Flow = &'static FlowCells;
    type Repeat = &'static RepeatCells;

    #[inline(always)]
    fn clock(&self) -> u64 {
        // SAFETY: the helper takes nothing.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn settings(&self) -> Option<&SettingsValue> {
        SETTINGS.get(0).filter(|settings| settings.version != 0)
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&DeviceValue> {
        // SAFETY: not preallocated, so an entry is not reused while the program can see it.
        unsafe { DEVICES.get(ifindex) }
    }

    #[inline(always)]
    fn endpoint(&self, ifindex: u32) -> Option<&EndpointValue> {
        // SAFETY: as above.
        unsafe { ENDPOINTS.get(ifindex) }
    }

    #[inline(always)]
    fn marked(&self, mark: u32) -> Option<&MarkValue> {
        // SAFETY: as above.
        unsafe { IDENTITIES.get(mark) }
    }

    #[inline(always)]
    fn owner(&self, address: &Address) -> Option<&OwnerValue> {
        match address {
            Address::V4(a) => OWNERS4.get(Key::new(32, *a)),
            Address::V6(a) => OWNERS6.get(Key::new(128, *a)),
        }
    }

    #[inline(always)]
    fn path(&self, node: u16) -> Option<&PathValue> {
        // SAFETY: as above.
        unsafe { PATHS.get(u32::from(node)) }
    }

    #[inline(always)]
    fn pool(&self, address: &Address) -> Option<u32> {
        match address {
            Address::V4(a) => POOLS4.get(Key::new(32, *a)).copied(),
            Address::V6(a) => POOLS6.get(Key::new(128, *a)).copied(),
        }
    }

    #[inline(always)]
    fn node(&self, address: &Address) -> Option<&NodeValue> {
        let key = match address {
            Address::V4(a) => NodeKey::v4(*a),
            Address::V6(a) => NodeKey::v6(*a),
        };
        // SAFETY: as above.
        unsafe { NODES.get(key) }
    }

    #[inline(always)]
    fn policy(&self, endpoint: u16) -> Option<PolicyValue> {
        // SAFETY: as above.
        unsafe { POLICY_ENDPTS.get(endpoint) }.copied()
    }

    #[inline(always)]
    fn port(&self, key: PortKey) -> Option<PortValue> {
        POLICY_PORTS.get(Key::new(64, key)).copied()
    }

    #[inline(always)]
    fn verdict(&self, key: VerdictKey) -> Option<VerdictValue> {
        // SAFETY: as above.
        unsafe { POLICY_VERDICT.get(key) }.copied()
    }

    #[inline(always)]
    fn prefix(&self, table: u32, address: &Address) -> Option<u32> {
        let table = table.to_be_bytes();
        match address {
            Address::V4(address) => {
                let key = Cidr4Key {
                    table,
                    address: *address,
                };
                POLICY_CIDRS4.get(Key::new(64, key)).copied()
            }
            Address::V6(address) => {
                let key = Cidr6Key {
                    table,
                    address: *address,
                };
                POLICY_CIDRS6.get(Key::new(160, key)).copied()
            }
        }
    }

    #[inline(always)]
    fn flow_state(&self) -> Option<&FlowState> {
        FLOW_STATE.get(0)
    }

    #[inline(always)]
    fn flow(&self, table: Table, key: &FlowKey) -> Option<&'static FlowCells> {
        let pointer = match table {
            Table::Established => FLOWS.get_ptr_mut(key),
            Table::New => FLOWS_NEW.get_ptr_mut(key),
        };
        // SAFETY: the verifier knows that the pointer is to a whole value, which has the layout of the cells.
        pointer.map(|pointer| unsafe { &*pointer.cast::<FlowCells>() })
    }

    #[inline(always)]
    fn insert_flow(&self, table: Table, key: &FlowKey, value: &FlowValue) -> bool {
        match table {
            Table::Established => FLOWS.insert(key, value, BPF_ANY.into()).is_ok(),
            Table::New => FLOWS_NEW.insert(key, value, BPF_ANY.into()).is_ok(),
        }
    }

    #[inline(always)]
    fn remove_flow(&self, table: Table, key: &FlowKey) {
        // One that is gone already was removed by another CPU, or by the agent.
        let _ = match table {
            Table::Established => FLOWS.remove(key),
            Table::New => FLOWS_NEW.remove(key),
        };
    }

    #[inline(always)]
    fn flow_count(&self, endpoint: u16) -> u32 {
        FLOW_COUNTS.get(endpoint.into()).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn add_flow(&self, endpoint: u16) {
        if let Some(count) = FLOW_COUNTS.get_ptr_mut(endpoint.into()) {
            // SAFETY: the verifier knows that the pointer is to 4 bytes, aligned. The target has no atomics of that
            // width in `core`, but the machine has the instruction.
            unsafe {
                asm!("lock *(u32 *)({count} + 0) += {one}", count = in(reg) count, one = in(reg) 1_u64)
            };
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        // SAFETY: the value is copied at once; an entry that is replaced meanwhile is of a datagram of the same time.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn insert_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        // Where it cannot be noted, the later fragments are dropped.
        let _ = FRAGMENTS.insert(key, value, BPF_ANY.into());
    }

    #[inline(always)]
    fn repeat(&self, key: &RepeatKey) -> Option<&'static RepeatCells> {
        // SAFETY: the verifier knows that the pointer is to a whole value, which has the layout of the cells.
        EVENT_REPEATS
            .get_ptr_mut(key)
            .map(|pointer| unsafe { &*pointer.cast::<RepeatCells>() })
    }

    #[inline(always)]
    fn insert_repeat(&self, key: &RepeatKey, value: &RepeatValue) {
        // Where it cannot be noted, the next one is told as well.
        let _ = EVENT_REPEATS.insert(key, value, BPF_ANY.into());
    }

    #[inline(always)]
    fn emit(&self, event: &Event) {
        match EVENTS.reserve::<Event>(0) {
            Some(mut place) => {
                place.write(*event);
                place.submit(0);
            }
            None => add_one(&EVENTS_LOST, 0),
        }
    }
}

/// Counts a packet that our programs drop.
#[inline(always)]
pub(crate) fn count_drop(hook: Hook, reason: DropReason) {
    add_one(&DROPS, hook as u32 * limits::REASONS + reason as u32);
}

#[inline(always)]
fn add_one(counters: &PerCpuArray<u64>, index: u32) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: the verifier knows that the pointer is to 8 bytes; the entry is this CPU's own.
        unsafe { *counter += 1 };
    }
}

/// Counts a packet that the stack freed with a reason, where it belongs to our network namespace.
#[inline(always)]
pub(crate) fn count_stack_drop(ctx: &RawTracePointContext) {
    let Some(trace) = TRACE.get(0) else { return };
    // Arguments of the tracepoint: the packet, where it was freed, why.
    let skb: u64 = ctx.arg(0);
    let site: u64 = ctx.arg(1);
    let reason = ctx.arg::<u64>(2) as u32;
    if trace.netns == 0 || trace.ignored.contains(&reason) {
        return;
    }
    // The device tells where it was dropped. In a socket's queue its place holds other things; the socket tells.
    let netns = netns_of(skb, trace.skb_dev, trace.dev_net, trace.net_inum)
        .or_else(|| netns_of(skb, trace.skb_sk, trace.sock_net, trace.net_inum));
    if netns != Some(trace.netns) || (reason == trace.unspecified && count_site(site)) {
        return;
    }
    add_one(&STACK_DROPS, reason.min(limits::STACK_REASONS - 1));
}

/// Counts a drop by the place in the kernel; `false` where there is no room.
#[inline(always)]
fn count_site(site: u64) -> bool {
    if STACK_SITES.get_ptr_mut(site).is_none() {
        // Another CPU may do the same at this moment: then it is there, which is all that is wanted.
        let _ = STACK_SITES.insert(site, 0, BPF_NOEXIST.into());
    }
    match STACK_SITES.get_ptr_mut(site) {
        Some(counter) => {
            // SAFETY: the verifier knows that the pointer is to 8 bytes; the entry is this CPU's own.
            unsafe { *counter += 1 };
            true
        }
        None => false,
    }
}

/// Follows packet -> device or socket -> namespace -> inode number; `None` where a pointer leads nowhere.
#[inline(always)]
fn netns_of(skb: u64, member: u32, net: u32, inum: u32) -> Option<u32> {
    let holder = read::<u64>(skb, member).filter(|pointer| *pointer != 0)?;
    let net = read::<u64>(holder, net).filter(|pointer| *pointer != 0)?;
    read::<u32>(net, inum)
}

#[inline(always)]
fn read<T: Copy>(base: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address and fails where it cannot be read.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.ok()
}
