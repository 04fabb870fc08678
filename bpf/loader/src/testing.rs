//! Runs of the loaded programs on made-up packets (`BPF_PROG_TEST_RUN`): for tests, fuzzing and measurements. The maps are
//! the real ones: what a program notes of a packet, it notes here too.

use std::time::Duration;

use aya::programs::{CgroupSkb, Program, SchedClassifier, TestRun as _, TestRunOptions, TestRunResult};

use crate::{Datapath, Error};

/// A packet, and what the kernel says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestPacket<'a> {
    /// From its Ethernet header on, at least 14 bytes. `to_host` sees what follows that.
    pub frame: &'a [u8],
    /// Device that it is on; it must exist in the network namespace of the calling thread.
    pub ifindex: u32,
    /// Device that it came in by; 0 = made on this host.
    pub ingress_ifindex: u32,
    /// Its mark.
    pub mark: u32,
    /// How often to run the program on it.
    pub repeat: u32,
}

/// What a program said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestAnswer {
    /// Its return value: `TC_ACT_...`; for `to_host` 1 = pass, 0 = drop.
    pub action: i32,
    /// The packet goes on: to the stack, a socket, or another device.
    pub passed: bool,
    /// The mark afterwards.
    pub mark: u32,
    /// How long one run took on average.
    pub duration: Duration,
}

/// `TC_ACT_UNSPEC` and `TC_ACT_REDIRECT`: what our programs say of packets that pass.
const CLASSIFIER_PASSES: &[i32] = &[-1, 7];
const CGROUP_PASSES: &[i32] = &[1];

/// Offsets in `struct __sk_buff`, and its size.
const MARK: usize = 8;
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

impl Datapath {
    /// Runs a program, by its name, on a packet.
    pub fn test_run(&self, program: &str, packet: &TestPacket<'_>) -> Result<TestAnswer, Error> {
        let mut before = [0_u8; CONTEXT];
        for (offset, value) in [
            (MARK, packet.mark),
            (INGRESS_IFINDEX, packet.ingress_ifindex),
            (IFINDEX, packet.ifindex),
        ] {
            before[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let mut after = [0_u8; CONTEXT];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet.frame);
        options.ctx_in = Some(&before);
        options.ctx_out = Some(&mut after);
        options.repeat = packet.repeat;
        let (result, passing) = self.run(program, options)?;
        let action = result.return_value.cast_signed();
        let mut mark = [0; 4];
        mark.copy_from_slice(&after[MARK..MARK + 4]);
        Ok(TestAnswer {
            action,
            passed: passing.contains(&action),
            mark: u32::from_ne_bytes(mark),
            duration: result.duration,
        })
    }

    /// Also returns which values let a packet pass.
    fn run(&self, name: &str, options: TestRunOptions<'_>) -> Result<(TestRunResult, &'static [i32]), Error> {
        let (result, passing) = match self.programs.program(name)? {
            Program::SchedClassifier(program) => {
                (SchedClassifier::test_run(program, options), CLASSIFIER_PASSES)
            }
            Program::CgroupSkb(program) => (CgroupSkb::test_run(program, options), CGROUP_PASSES),
            other => {
                return Err(Error::Invalid(format!(
                    "{name} cannot be run on a packet: {other:?}"
                )));
            }
        };
        Ok((result.map_err(|error| Error::Load(Box::new(error)))?, passing))
    }
}

impl Datapath {
    /// Forgets all flows and fragments: the next test run starts as on a node that has just booted.
    pub fn clear_flows(&mut self) -> Result<(), Error> {
        for flows in [&self.maps.flows.established, &self.maps.flows.new] {
            flows.chunks(|keys, _| flows.remove_all(keys).map(|()| true))?;
        }
        let fragments = &self.maps.flows.fragments;
        fragments.chunks(|keys, _| fragments.remove_all(keys).map(|()| true))?;
        for (index, count) in self.maps.flows.counts.all()?.into_iter().enumerate() {
            if count != 0 {
                self.maps.flows.counts.set(index as u32, 0)?;
            }
        }
        Ok(())
    }
}
