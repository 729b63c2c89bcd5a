//! The CNI plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    egret::cni::plugin::run()
}
