//! `warren-cni`: the chained CNI plugin. It tells the agent about a pod's attachment and waits until the agent says
//! that traffic may flow; without an agent there is no pod. `warren-cni install` puts it behind a node's CNI plugins.
//!
//! It may not change any network device, knows neither keys nor policy, and has no async runtime.

mod attachment;
mod error;
mod install;
mod plugin;
mod spec;

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    // The CNI specification: parameters come in the environment, the command among them.
    match env::var("CNI_COMMAND") {
        Ok(command) => plugin::run(&command),
        Err(_) => install::run(env::args().skip(1)),
    }
}
