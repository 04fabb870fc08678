//! The engine alone: `warren-tunnel-engine RUN_DIR [DEVICE...]`.

use std::process::ExitCode;

use warren_wireguard::engine::{self, EngineConfig};

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut arguments = std::env::args().skip(1);
    let Some(run_dir) = arguments.next() else {
        eprintln!("usage: warren-tunnel-engine RUN_DIR [DEVICE...]");
        return ExitCode::from(2);
    };
    let config = EngineConfig {
        run_dir: run_dir.into(),
        devices: arguments.collect(),
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
