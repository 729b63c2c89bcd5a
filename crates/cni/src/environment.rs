//! The environment variables that a runtime sets, <https://www.cni.dev/docs/spec/#parameters>, read and validated in
//! one place.

use crate::attachment::{AttachmentId, PodRef};
use crate::protocol::{CniError, codes};
use std::ffi::OsString;
use std::path::PathBuf;

/// Longest container id, in bytes. It becomes part of a file's name; runtimes' ids have 64.
const MAX_CONTAINER_ID: usize = 200;
/// `IFNAMSIZ` less the NUL byte, include/uapi/linux/if.h.
const MAX_IFNAME: usize = 15;

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Add a container to a network.
    Add,
    /// Undo what ADD did.
    Del,
    /// Check that the network is as ADD left it.
    Check,
    /// Remove what is no longer valid.
    Gc,
    /// Check that containers can be added.
    Status,
    /// List the supported versions.
    Version,
}

impl Command {
    const ALL: [Command; 6] =
        [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];

    /// As it stands in `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }
}

/// A verb with its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// See [`Command::Add`].
    Add(PodInterface),
    /// See [`Command::Del`].
    Del(AttachmentId),
    /// See [`Command::Check`].
    Check(PodInterface),
    /// See [`Command::Gc`].
    Gc,
    /// See [`Command::Status`].
    Status,
    /// See [`Command::Version`].
    Version,
}

/// The interface of an ADD or CHECK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInterface {
    /// `CNI_CONTAINERID` and `CNI_IFNAME`.
    pub id: AttachmentId,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// The pod that `CNI_ARGS` names; `None` if the runtime is not a Kubernetes one.
    pub pod: Option<PodRef>,
}

impl Call {
    /// The call's verb.
    pub fn command(&self) -> Command {
        match self {
            Call::Add(_) => Command::Add,
            Call::Del(_) => Command::Del,
            Call::Check(_) => Command::Check,
            Call::Gc => Command::Gc,
            Call::Status => Command::Status,
            Call::Version => Command::Version,
        }
    }

    /// Reads the call from environment variables, which `variable` returns by name.
    ///
    /// # Errors
    /// Variables that the verb needs are missing (the text names all of them), or one is invalid.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let command = match set("CNI_COMMAND") {
            None => return Err(missing(&["CNI_COMMAND"])),
            Some(value) => Command::ALL.into_iter().find(|c| value == c.as_str()).ok_or_else(|| {
                let known = Command::ALL.map(Command::as_str).join(", ");
                wrong(format!("CNI_COMMAND={} is no CNI verb", value.display()), format!("it can be {known}"))
            })?,
        };
        let needed: &[&str] = match command {
            Command::Add | Command::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Command::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Command::Gc => return Ok(Call::Gc),
            Command::Status => return Ok(Call::Status),
            Command::Version => return Ok(Call::Version),
        };
        let absent: Vec<&str> = needed.iter().copied().filter(|name| set(name).is_none()).collect();
        if !absent.is_empty() {
            return Err(missing(&absent));
        }
        let text = |name: &str| match set(name).unwrap_or_default().into_string() {
            Ok(value) => Ok(value),
            Err(value) => Err(wrong(format!("{name}={} is not UTF-8", value.display()), "")),
        };
        let id = AttachmentId {
            container_id: container_id(text("CNI_CONTAINERID")?)?,
            ifname: ifname(text("CNI_IFNAME")?)?,
        };
        if command == Command::Del {
            // CNI_ARGS and CNI_NETNS are ignored: a DEL must succeed, whatever became of the pod.
            return Ok(Call::Del(id));
        }
        let netns = PathBuf::from(set("CNI_NETNS").unwrap_or_default());
        let target = PodInterface { id, netns, pod: pod(&text("CNI_ARGS")?)? };
        Ok(if command == Command::Add { Call::Add(target) } else { Call::Check(target) })
    }
}

fn missing(names: &[&str]) -> CniError {
    CniError::new(
        codes::INVALID_ENVIRONMENT,
        format!("missing environment variables: {}", names.join(", ")),
        "a container runtime sets them when it calls egret-cni (CNI specification)",
    )
}

fn wrong(msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError::new(codes::INVALID_ENVIRONMENT, msg, details)
}

/// An alphanumeric character, then alphanumeric characters, `_`, `.` or `-`, as the specification says.
fn container_id(id: String) -> Result<String, CniError> {
    let mut bytes = id.bytes();
    let fits = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && id.len() <= MAX_CONTAINER_ID;
    if fits {
        return Ok(id);
    }
    let must = format!(
        "it must start with a letter or a digit, hold only letters, digits, '_', '.' and '-', \
         and be no longer than {MAX_CONTAINER_ID}"
    );
    Err(wrong(format!("CNI_CONTAINERID={id:?} is not a container id"), must))
}

/// Checks an interface name as the kernel does: `dev_valid_name`, net/core/dev.c.
fn ifname(name: String) -> Result<String, CniError> {
    let fits = name.len() <= MAX_IFNAME
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if fits {
        return Ok(name);
    }
    let must =
        format!("it must be no longer than {MAX_IFNAME} bytes, hold no '/', ':' or white space, and not be . or ..");
    Err(wrong(format!("CNI_IFNAME={name:?} is not an interface name"), must))
}

/// Reads `KEY=VALUE;KEY=VALUE`. Keys that do not name the pod are ignored.
fn pod(args: &str) -> Result<Option<PodRef>, CniError> {
    let mut pod = PodRef::default();
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(|| {
            wrong(format!("CNI_ARGS={args:?}: {pair:?} is no KEY=VALUE"), "pairs are separated by semicolons")
        })?;
        match key {
            "K8S_POD_NAMESPACE" => value.clone_into(&mut pod.namespace),
            "K8S_POD_NAME" => value.clone_into(&mut pod.name),
            "K8S_POD_UID" => value.clone_into(&mut pod.uid),
            _ => {}
        }
    }
    match (pod.namespace.is_empty(), pod.name.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(pod)),
        // Half a name means a mistake, not another runtime, and a policy might select the pod.
        _ => Err(wrong(
            format!("CNI_ARGS={args:?} names a pod's namespace or name, but not both"),
            "set both K8S_POD_NAMESPACE and K8S_POD_NAME, or neither",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(variables: &[(&str, &str)]) -> Result<Call, CniError> {
        Call::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
    }

    fn add(changed: &[(&str, &str)]) -> Result<Call, CniError> {
        let mut all = changed.to_vec();
        all.extend([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_NETNS", "/n"), ("CNI_IFNAME", "eth0")]);
        read(&all)
    }

    #[test]
    fn all_missing_variables_are_named() {
        let error = read(&[("CNI_COMMAND", "ADD"), ("CNI_NETNS", "")]).unwrap_err();
        assert_eq!(error.code, codes::INVALID_ENVIRONMENT);
        assert_eq!(error.msg, "missing environment variables: CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME");
        assert_eq!(read(&[]).unwrap_err().msg, "missing environment variables: CNI_COMMAND");
        assert_eq!(
            read(&[("CNI_COMMAND", "DEL")]).unwrap_err().msg,
            "missing environment variables: CNI_CONTAINERID, CNI_IFNAME"
        );
    }

    #[test]
    fn the_pod_is_named_whole_or_not_at_all() {
        let pod = |args| match add(&[("CNI_ARGS", args)]) {
            Ok(Call::Add(target)) => Ok(target.pod),
            other => Err(format!("{other:?}")),
        };
        let shop = PodRef { namespace: "shop".into(), name: "web-0".into(), uid: "7".into() };
        let all =
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=7";
        assert_eq!(pod(all), Ok(Some(shop)));
        assert_eq!(pod(""), Ok(None));
        assert_eq!(pod("FOO=BAR;"), Ok(None));
        assert!(pod("K8S_POD_NAMESPACE=shop").is_err());
        assert!(pod("K8S_POD_NAME=web-0;K8S_POD_NAMESPACE=").is_err());
        assert!(pod("FOO").is_err());
        assert!(pod("=x").is_err());
    }

    #[test]
    fn values_that_become_file_names_are_checked() {
        for id in ["../x", "-a", ".", "a/b", "a b", "a@b", "ä", &"a".repeat(201)] {
            assert!(add(&[("CNI_CONTAINERID", id)]).is_err(), "{id}");
        }
        for name in [".", "..", "a/b", "a:b", "a b", "a\tb", "sixteencharsxxxx"] {
            assert!(add(&[("CNI_IFNAME", name)]).is_err(), "{name}");
        }
        assert!(add(&[("CNI_CONTAINERID", "a_.-9"), ("CNI_IFNAME", "eth0.100@x")]).is_ok());
    }

    #[test]
    fn del_ignores_cni_args() {
        let call =
            read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_ARGS", "broken")]);
        assert_eq!(call.unwrap().command(), Command::Del);
    }

    proptest! {
        #[test]
        fn any_environment_is_accepted_or_rejected(
            verb in "ADD|DEL|CHECK|GC|STATUS|VERSION|.{0,4}", id in "[a-z0-9./_-]{0,9}|.{0,4}", netns in ".{0,9}",
            name in "[a-z0-9.:/ ]{0,17}", args in "([A-Z0-9_]{0,4}[=;]?.{0,3};?){0,4}",
        ) {
            let call = read(&[
                ("CNI_COMMAND", &verb), ("CNI_CONTAINERID", &id), ("CNI_NETNS", &netns), ("CNI_IFNAME", &name),
                ("CNI_ARGS", &args),
            ]);
            match call {
                Err(failure) => prop_assert_eq!(failure.code, codes::INVALID_ENVIRONMENT),
                Ok(Call::Add(PodInterface { id, .. }) | Call::Check(PodInterface { id, .. }) | Call::Del(id)) => {
                    // Both become parts of a file's name.
                    prop_assert!(!id.container_id.contains('/') && !id.ifname.contains('/'));
                    prop_assert!(!id.container_id.is_empty() && !id.ifname.is_empty());
                }
                Ok(other) => prop_assert_eq!(other.command().as_str(), verb),
            }
        }

        #[test]
        fn the_pod_of_the_runtimes_arguments_is_parsed(
            pod in ["[a-z0-9-]{1,9}", "[a-z0-9.-]{1,9}", "[a-z0-9-]{0,9}"], others in prop::collection::vec("[A-J]{1,4}=[^;=]{0,4}", 0..4),
        ) {
            let [namespace, name, uid] = pod;
            let args = format!(
                "{};K8S_POD_NAME={name};K8S_POD_UID={uid};K8S_POD_NAMESPACE={namespace}", others.join(";")
            );
            let Ok(Call::Add(target)) = add(&[("CNI_ARGS", &args)]) else { panic!("{args}") };
            prop_assert_eq!(target.pod, Some(PodRef { namespace, name, uid }));
        }
    }
}
