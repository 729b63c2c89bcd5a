//! The CNI plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    egret_cni::plugin::run()
}
