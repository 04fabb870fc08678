//! The engine alone: `warren-tunnel-engine [--engine=NAME] [--linger] RUN_DIR [DEVICE...]`.

use std::process::ExitCode;

use warren_wireguard::engine::{self, EngineConfig, Implementation};

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let usage = |problem: &str| {
        eprintln!("{problem}; usage: warren-tunnel-engine [--engine=NAME] [--linger] RUN_DIR [DEVICE...]");
        ExitCode::from(2)
    };
    let mut arguments = std::env::args().skip(1).peekable();
    let mut implementation = Implementation::default();
    if let Some(name) = arguments.next_if(|argument| argument.starts_with("--engine=")) {
        match name["--engine=".len()..].parse() {
            Ok(named) => implementation = named,
            Err(error) => return usage(&error),
        }
    }
    let linger = arguments.next_if(|argument| argument == "--linger").is_some();
    let Some(run_dir) = arguments.next() else {
        return usage("no run directory");
    };
    let config = EngineConfig {
        run_dir: run_dir.into(),
        devices: arguments.collect(),
        implementation,
        linger,
        ..EngineConfig::default()
    };
    match engine::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
