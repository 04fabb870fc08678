//! The eBPF programs: each reads a packet, asks its verdict, and turns an error into a counted drop. All that
//! is decided is decided in the library.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "kernel helpers and the context are raw pointers")
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(unreachable_pub, reason = "aya's macros need entries and make them public")
)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(target_arch = "bpf")]
mod entries {
    use aya_ebpf::{
        bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
        helpers::generated::bpf_redirect,
        macros::{cgroup_skb, classifier, raw_tracepoint},
        programs::{RawTracePointContext, SkBuffContext, TcContext},
    };
    use warren_abi::Hook;
    use warren_programs::{Judgement, Verdict};

    use crate::kernel::{KernelMaps, Skb, count_drop, count_stack_drop, meta, scratch};

    /// What a program of a control group returns.
    const DROP: i32 = 0;
    const PASS: i32 = 1;

    #[classifier]
    pub fn from_pod(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::FromPod,
            warren_programs::from_pod(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[classifier]
    pub fn to_pod(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::ToPod,
            warren_programs::to_pod(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[classifier]
    pub fn tun_in(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::TunIn,
            warren_programs::tun_in(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[classifier]
    pub fn tun_eg(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::TunEg,
            warren_programs::tun_eg(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[classifier]
    pub fn barrier_in(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::BarrierIn,
            warren_programs::barrier_in(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[classifier]
    pub fn barrier_out(ctx: TcContext) -> i32 {
        let Some(scratch) = scratch() else {
            return TC_ACT_SHOT;
        };
        finish(
            &ctx,
            Hook::BarrierOut,
            warren_programs::barrier_out(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch),
        )
    }

    #[cgroup_skb(ingress)]
    pub fn to_host(ctx: SkBuffContext) -> i32 {
        let Some(scratch) = scratch() else {
            return DROP;
        };
        match warren_programs::to_host(&Skb(&ctx.skb), &KernelMaps, &meta(&ctx.skb), scratch) {
            Ok(Verdict::Pass { .. }) => PASS,
            // There is no other way into a socket.
            Ok(Verdict::Redirect { .. }) => DROP,
            Err(reason) => {
                count_drop(Hook::ToHost, reason);
                DROP
            }
        }
    }

    /// Counts what the stack drops in this node's network namespace.
    #[raw_tracepoint(tracepoint = "kfree_skb")]
    pub fn stack_drop(ctx: RawTracePointContext) -> i32 {
        count_stack_drop(&ctx);
        0
    }

    /// The one place where a verdict becomes what the kernel does. `TC_ACT_UNSPEC` lets programs of others
    /// behind ours have their say.
    #[inline(always)]
    fn finish(ctx: &TcContext, hook: Hook, judgement: Judgement) -> i32 {
        match judgement {
            Ok(Verdict::Pass { mark }) => {
                ctx.set_mark(mark);
                TC_ACT_UNSPEC
            }
            Ok(Verdict::Redirect { ifindex, mark }) => {
                ctx.set_mark(mark);
                // SAFETY: the helper takes plain numbers.
                unsafe { bpf_redirect(ifindex, 0) as i32 }
            }
            Err(reason) => {
                count_drop(hook, reason);
                TC_ACT_SHOT
            }
        }
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel offers some helpers to programs under the GPL only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

/// There is nothing to run on the host; the library is tested there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
