//! The network configuration that a runtime writes to the plugin's standard input, read and validated in one place.
//!
//! Unknown keys are ignored: runtimes add keys of their own, and an administrator's keys may be meant for other
//! plugins. A known key of a wrong type is an error that names the key.

use crate::attachment::AttachmentId;
use crate::environment::Command;
use crate::protocol::{CniError, codes};
use crate::version::Version;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The longest configuration accepted, in bytes. Real ones have some kilobytes.
pub const MAX_BYTES: usize = 8 * 1024 * 1024;

/// The daemon's socket, unless `socket` names another.
pub const DEFAULT_SOCKET: &str = "/run/egret/cni.sock";
/// The directory of the offline policy snapshot, unless `stateDir` names another. It outlives a reboot.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/egret";
/// `sun_path` less the NUL byte, include/uapi/linux/un.h.
const MAX_SOCKET: usize = 107;

/// Reads all of standard input.
///
/// # Errors
/// Standard input cannot be read, or has more than [`MAX_BYTES`].
pub fn read(input: impl Read) -> Result<Vec<u8>, CniError> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|e: io::Error| {
        CniError::new(codes::IO, format!("the configuration cannot be read from standard input: {e}"), "")
    })?;
    if bytes.len() > MAX_BYTES {
        return Err(CniError::new(
            codes::DECODE,
            format!("the configuration on standard input is longer than {} MiB", MAX_BYTES >> 20),
            "this is no network configuration; check what calls the plugin",
        ));
    }
    Ok(bytes)
}

/// A configuration's keys with their values as raw JSON. `prevResult` stays raw, because the plugin prints it
/// unchanged.
pub struct Fields<'a>(HashMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Splits a configuration into its keys.
    ///
    /// # Errors
    /// The bytes are not a JSON object.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CniError> {
        serde_json::from_slice(bytes).map(Fields).map_err(|e| {
            let msg = format!("the configuration on standard input is no JSON object: {e}");
            CniError::new(codes::DECODE, msg, "check the conflist with a JSON parser")
        })
    }

    /// `cniVersion`. A DEL without one is accepted: nothing in a DEL depends on the version.
    ///
    /// # Errors
    /// `cniVersion` is missing, of a wrong type, or not supported.
    pub fn version(&self, command: Command) -> Result<Version, CniError> {
        match self.optional::<String>("cniVersion")? {
            Some(version) => Version::parse(&version),
            None if command == Command::Del => Ok(Version::LATEST),
            None => Err(CniError::new(
                codes::INCOMPATIBLE,
                "the configuration has no cniVersion, which means 0.1.0",
                format!("set cniVersion in the network configuration to one of {}", Version::list()),
            )),
        }
    }

    fn optional<T: Deserialize<'a>>(&self, key: &str) -> Result<Option<T>, CniError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        serde_json::from_str(value.get())
            .map_err(|e| CniError::new(codes::DECODE, format!("{key} in the network configuration: {e}"), ""))
    }
}

/// A validated configuration.
pub struct Config<'a> {
    /// `name`, the network's name. Empty only for DEL and STATUS, which do not need it.
    pub network: String,
    /// `socket`, the daemon's socket.
    pub socket: PathBuf,
    /// `stateDir`, the directory of the daemon's files that outlive a reboot.
    pub state_dir: PathBuf,
    /// `prevResult` as raw JSON; `None` if missing or null.
    pub previous: Option<&'a RawValue>,
    /// `cni.dev/valid-attachments` of a GC.
    pub valid: Vec<AttachmentId>,
}

impl<'a> Config<'a> {
    /// Reads the fields that `command` needs.
    ///
    /// # Errors
    /// A known field has a wrong type or an invalid value.
    pub fn read(fields: &Fields<'a>, command: Command) -> Result<Self, CniError> {
        let network = fields.optional::<String>("name")?.unwrap_or_default();
        if network.is_empty() && !matches!(command, Command::Del | Command::Status) {
            return Err(invalid("the network configuration has no name", "give the network a name"));
        }
        let socket = fields.optional::<PathBuf>("socket")?.unwrap_or_else(|| DEFAULT_SOCKET.into());
        check_socket(&socket)?;
        let state_dir = fields.optional::<PathBuf>("stateDir")?.unwrap_or_else(|| DEFAULT_STATE_DIR.into());
        check_state_dir(&state_dir)?;
        let previous = fields.0.get("prevResult").copied().filter(|value| value.get() != "null");
        let valid = if command == Command::Gc { valid_attachments(fields)? } else { Vec::new() };
        Ok(Config { network, socket, state_dir, previous, valid })
    }

    /// The daemon's run directory, which is the socket's parent.
    pub fn run_dir(&self) -> &Path {
        self.socket.parent().unwrap_or(Path::new("/"))
    }
}

fn valid_attachments(fields: &Fields<'_>) -> Result<Vec<AttachmentId>, CniError> {
    #[derive(Deserialize)]
    struct Valid {
        #[serde(rename = "containerID")]
        container_id: String,
        ifname: String,
    }
    // libcni used the second key before the specification defined the first.
    let key = ["cni.dev/valid-attachments", "cni.dev/attachments"].into_iter().find(|k| fields.0.contains_key(*k));
    let Some(key) = key else {
        // Do not take this as an empty list: that would remove all attachments.
        return Err(invalid(
            "GC without cni.dev/valid-attachments",
            "the runtime must list the attachments that are still valid; nothing was removed",
        ));
    };
    // Go encodes a nil slice as null.
    let list = fields.optional::<Vec<Valid>>(key)?.unwrap_or_default();
    Ok(list.into_iter().map(|v| AttachmentId { container_id: v.container_id, ifname: v.ifname }).collect())
}

/// Rejects a path that cannot be the daemon's socket.
///
/// # Errors
/// The path is relative or too long for `sun_path`.
pub fn check_socket(socket: &Path) -> Result<(), CniError> {
    if socket.is_absolute() && socket.as_os_str().len() <= MAX_SOCKET {
        return Ok(());
    }
    Err(invalid(
        format!("socket {socket:?} is relative or too long"),
        format!("set it to the absolute path of egretd's socket, at most {MAX_SOCKET} bytes"),
    ))
}

/// Rejects a path that cannot be the state directory.
///
/// # Errors
/// The path is relative.
pub fn check_state_dir(state_dir: &Path) -> Result<(), CniError> {
    if state_dir.is_absolute() {
        return Ok(());
    }
    Err(invalid(
        format!("state directory {state_dir:?} is relative"),
        "set it to the absolute path of egretd's state directory",
    ))
}

fn invalid(msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError::new(codes::INVALID_CONFIGURATION, msg, details)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code<T>(result: Result<T, CniError>) -> (u32, String) {
        let failure = result.err().expect("a failure");
        (failure.code, failure.msg)
    }

    fn config(text: &str, command: Command) -> Result<(String, PathBuf, Option<String>, usize), CniError> {
        let fields = Fields::parse(text.as_bytes())?;
        let c = Config::read(&fields, command)?;
        Ok((c.network.clone(), c.run_dir().into(), c.previous.map(|p| p.get().to_owned()), c.valid.len()))
    }

    #[test]
    fn unknown_keys_are_ignored_and_defaults_filled_in() {
        let text = r#"{"name": "n", "type": "egret-cni", "sokcet": 5, "runtimeConfig": {}, "prevResult": null}"#;
        assert_eq!(config(text, Command::Add).unwrap(), ("n".into(), "/run/egret".into(), None, 0));
    }

    #[test]
    fn the_previous_result_is_kept_as_it_was_written() {
        let text = r#"{"name": "n", "socket": "/x/y/s", "prevResult": { "b" :1.50,"a":[ ] }}"#;
        let (_, run_dir, previous, _) = config(text, Command::Add).unwrap();
        assert_eq!(run_dir, Path::new("/x/y"));
        assert_eq!(previous.unwrap(), r#"{ "b" :1.50,"a":[ ] }"#);
    }

    #[test]
    fn a_wrong_type_names_its_key() {
        for (text, key) in [
            (r#"{"name": 5}"#, "name"),
            (r#"{"name": "n", "socket": []}"#, "socket"),
            (r#"{"name": "n", "stateDir": 1}"#, "stateDir"),
        ] {
            let (code, msg) = code(config(text, Command::Add));
            assert!(code == codes::DECODE && msg.starts_with(key), "{code} {msg}");
        }
        let gc = r#"{"name": "n", "cni.dev/valid-attachments": [{"containerID": 1}]}"#;
        assert!(code(config(gc, Command::Gc)).1.starts_with("cni.dev/valid-attachments"));
        let version = Fields::parse(br#"{"cniVersion": 1}"#).unwrap().version(Command::Add);
        assert_eq!(code(version).0, codes::DECODE);
    }

    #[test]
    fn a_socket_is_absolute_and_short() {
        for socket in ["cni.sock".to_owned(), String::new(), format!("/{}", "x".repeat(107))] {
            let text = format!(r#"{{"name": "n", "socket": "{socket}"}}"#);
            assert_eq!(code(config(&text, Command::Add)).0, codes::INVALID_CONFIGURATION, "{socket}");
        }
    }

    #[test]
    fn gc_without_a_list_collects_nothing_and_null_is_an_empty_list() {
        assert_eq!(code(config(r#"{"name": "n"}"#, Command::Gc)).0, codes::INVALID_CONFIGURATION);
        assert_eq!(config(r#"{"name": "n", "cni.dev/valid-attachments": null}"#, Command::Gc).unwrap().3, 0);
        let old = r#"{"name": "n", "cni.dev/attachments": [{"containerID": "c", "ifname": "eth0"}]}"#;
        assert_eq!(config(old, Command::Gc).unwrap().3, 1);
    }

    #[test]
    fn garbage_is_rejected_at_any_depth() {
        for text in ["", "[]", "null", "{", r#"{"a": 1} x"#, "\u{0}"] {
            assert_eq!(code(config(text, Command::Add)).0, codes::DECODE, "{text}");
        }
        let deep = format!(r#"{{"name": "n", "x": {}"#, "[".repeat(1_000_000));
        assert_eq!(code(config(&deep, Command::Add)).0, codes::DECODE);
        let fine = format!(r#"{{"name": "n", "x": {}{}}}"#, "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(config(&fine, Command::Add).is_ok());
    }

    #[test]
    fn input_has_a_bound() {
        assert_eq!(read(&vec![b' '; MAX_BYTES][..]).unwrap().len(), MAX_BYTES);
        assert_eq!(code(read(io::repeat(b' '))).0, codes::DECODE);
    }

    #[test]
    fn a_missing_version_stops_all_but_del() {
        let fields = Fields::parse(b"{}").unwrap();
        assert_eq!(code(fields.version(Command::Add)).0, codes::INCOMPATIBLE);
        assert_eq!(fields.version(Command::Del).unwrap(), Version::LATEST);
    }

    const KEYS: [&str; 9] = [
        "cniVersion",
        "name",
        "type",
        "socket",
        "stateDir",
        "prevResult",
        "cni.dev/valid-attachments",
        "cni.dev/attachments",
        "sokcet",
    ];
    const VALUES: [&str; 14] = [
        "null",
        "5",
        "\"\"",
        "\"x\"",
        "\"/x\"",
        "\"1.0.0\"",
        "[]",
        "{}",
        "[null]",
        "true",
        "-1e999",
        "\"\\ud800\"",
        "[{\"containerID\":\"a\",\"ifname\":\"b\"}]",
        "[{\"containerID\":5}]",
    ];

    proptest! {
        #[test]
        fn any_configuration_is_accepted_or_rejected(
            fields in prop::collection::vec((prop::sample::select(&KEYS[..]), prop::sample::select(&VALUES[..])), 0..7),
            cut in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let fields: Vec<String> = fields.iter().map(|(key, value)| format!("{key:?}:{value}")).collect();
            let text = format!("{{{}}}", fields.join(","));
            for bytes in [text.as_bytes(), &text.as_bytes()[..cut.index(text.len())], &noise] {
                let Ok(fields) = Fields::parse(bytes) else { continue };
                for command in [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status] {
                    let known = [codes::DECODE, codes::INCOMPATIBLE, codes::INVALID_CONFIGURATION];
                    match (fields.version(command), Config::read(&fields, command)) {
                        (_, Ok(config)) => {
                            prop_assert!(config.socket.is_absolute() && config.state_dir.is_absolute());
                            prop_assert!(config.previous.is_none_or(|previous| previous.get() != "null"));
                        }
                        (Err(failure), _) | (_, Err(failure)) => prop_assert!(known.contains(&failure.code)),
                    }
                }
            }
        }
    }
}
