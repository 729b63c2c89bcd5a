//! Where things lie: the repository, and what cargo has built.

use std::env;
use std::path::{Path, PathBuf};

/// The repository.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// One of Egret's programs, `egretd` or `egret-cni`: cargo builds both before any integration test or benchmark, into
/// the directory above its own. (`CARGO_BIN_EXE_egretd` is known to tests of Egret's crate alone.)
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let path = built().join(name);
    assert!(path.is_file(), "{} is not there; `cargo build` makes it", path.display());
    path
}

/// Where tests may leave what is to outlive them: cargo's directory for that, `CARGO_TARGET_TMPDIR`.
pub fn kept() -> PathBuf {
    let path = built().parent().map(|target| target.join("tmp"));
    path.expect("cargo builds into a directory of a directory")
}

/// `target/HOST/debug`, for one.
fn built() -> PathBuf {
    let this = env::current_exe().expect("this program's path");
    let directory = this.ancestors().nth(2).expect("cargo puts tests into a directory `deps`");
    directory.to_owned()
}
