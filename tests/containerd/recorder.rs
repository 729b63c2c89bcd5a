//! A plugin that records the runtime's calls, and passes everything on.

use crate::runtime::Containerd;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// The plugin's type.
pub const TYPE: &str = "recorder";

/// The recorded calls.
pub struct Recorder {
    calls: PathBuf,
}

/// One call.
#[derive(Debug)]
pub struct Call {
    /// The variables whose names begin with `CNI_`.
    pub variables: BTreeMap<String, String>,
    /// The bytes on stdin.
    pub input: Value,
}

impl Call {
    /// A variable; empty if it is not set.
    pub fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }
}

impl Recorder {
    /// Installs the plugin in the runtime's directory. The conflist must name it.
    pub fn put(runtime: &Containerd) -> Recorder {
        let calls = runtime.bin_dir.with_file_name("calls");
        fs::create_dir_all(&calls).expect("make a directory");
        let place = calls.display();
        let script = format!(
            "#!/bin/sh\nset -e\nbase={place}/$(date +%s%N)-$$\nenv | grep ^CNI_ >$base.env\ncat >$base.new\n\
             mv $base.new $base.json\n[ \"$CNI_COMMAND\" != ADD ] || jq -c .prevResult $base.json\n"
        );
        let program = runtime.bin_dir.join(TYPE);
        fs::write(&program, script).expect("write");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
        Recorder { calls }
    }

    /// The calls of one verb, in order.
    pub fn calls(&self, verb: &str) -> Vec<Call> {
        let mut all: Vec<PathBuf> =
            fs::read_dir(&self.calls).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.retain(|p| p.extension().is_some_and(|e| e == "json"));
        all.sort();
        let read = |path: PathBuf| {
            let text = fs::read_to_string(path.with_extension("env")).expect("a call's environment");
            let pairs = text.lines().filter_map(|l| l.split_once('='));
            Call {
                variables: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
                input: serde_json::from_slice(&fs::read(&path).expect("a call's input")).expect("JSON"),
            }
        };
        all.into_iter().map(read).filter(|c| c.variable("CNI_COMMAND") == verb).collect()
    }
}
