//! The areas of the directory: the user's manifests, and `status/`, which Egret writes.

use crate::cluster::kind::Kind;
use crate::cluster::object::Identity;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The directory of statuses, in the directory of manifests.
pub const STATUS: &str = "status";

/// What a directory contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The user's manifests.
    Manifests,
    /// Directories of statuses, by kind or by namespace.
    StatusParent,
    /// Statuses.
    Statuses,
}

impl Area {
    /// The area of `path`, which is relative to the root; `None` if it is not read. Without `policies`, the statuses
    /// of policies are not read.
    pub fn of(path: &Path, policies: bool) -> Option<Area> {
        let mut parts = path.components().map(|c| c.as_os_str().to_str().unwrap_or_default());
        if parts.next() != Some(STATUS) {
            return Some(Area::Manifests);
        }
        match (parts.next(), parts.next(), parts.next()) {
            (None, ..) => Some(Area::StatusParent),
            (Some("egressgateways" | "egressnodes"), None, _) => Some(Area::Statuses),
            (Some("clusteregresspolicies"), None, _) if policies => Some(Area::Statuses),
            (Some("egresspolicies"), None, _) if policies => Some(Area::StatusParent),
            (Some("egresspolicies"), Some(_), None) if policies => Some(Area::Statuses),
            _ => None,
        }
    }
}

/// The path of an object's status, relative to the root; `None` if Egret writes no status of this kind.
pub fn status_path((kind, namespace, name): Identity<'_>) -> Option<PathBuf> {
    let mut path = PathBuf::from(STATUS);
    path.push(match kind {
        Kind::EgressGateway => "egressgateways",
        Kind::EgressNode => "egressnodes",
        Kind::EgressPolicy => "egresspolicies",
        Kind::ClusterEgressPolicy => "clusteregresspolicies",
        _ => return None,
    });
    path.extend(namespace);
    path.push(format!("{name}.yaml"));
    Some(path)
}

/// The object whose status the file `path` has; `None` if it is no status file.
pub fn status_of(path: &Path) -> Option<Identity<'_>> {
    let name = path.file_name()?.to_str()?.strip_suffix(".yaml")?;
    let mut parts = path.parent()?.components().map(|c| c.as_os_str().to_str().unwrap_or_default());
    if parts.next() != Some(STATUS) {
        return None;
    }
    Some(match (parts.next()?, parts.next(), parts.next()) {
        ("egressgateways", None, _) => (Kind::EgressGateway, None, name),
        ("egressnodes", None, _) => (Kind::EgressNode, None, name),
        ("clusteregresspolicies", None, _) => (Kind::ClusterEgressPolicy, None, name),
        ("egresspolicies", Some(namespace), None) => (Kind::EgressPolicy, Some(namespace), name),
        _ => return None,
    })
}

/// Whether a file of this name holds manifests. Editors and Kubernetes use names that start with a dot.
pub fn is_manifest(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !is_hidden(name) && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Whether the name starts with a dot.
pub fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_found_where_it_is_written() {
        for identity in [
            (Kind::EgressGateway, None, "default"),
            (Kind::EgressNode, None, "node-1.example.org"),
            (Kind::EgressPolicy, Some("shop"), "visitor"),
            (Kind::ClusterEgressPolicy, None, "all"),
        ] {
            let path = status_path(identity).unwrap();
            assert_eq!(status_of(&path), Some(identity));
            assert_eq!(Area::of(path.parent().unwrap(), true), Some(Area::Statuses));
        }
    }

    #[test]
    fn a_node_does_not_read_the_statuses_of_policies() {
        for path in ["status/egresspolicies", "status/egresspolicies/shop", "status/clusteregresspolicies"] {
            assert_eq!(Area::of(Path::new(path), false), None);
        }
        assert_eq!(Area::of(Path::new("status"), false), Some(Area::StatusParent));
        assert_eq!(Area::of(Path::new("status/mine"), true), None);
        assert_eq!(Area::of(Path::new(""), true), Some(Area::Manifests));
        assert_eq!(Area::of(Path::new("sub/status"), true), Some(Area::Manifests));
    }

    #[test]
    fn editors_leftovers_are_no_manifests() {
        for name in [".a.yaml.swp", "a.yaml~", "#a.yaml#", ".#a.yaml", "4913", "a.yaml.bak", ".yaml", "a.txt"] {
            assert!(!is_manifest(OsStr::new(name)), "{name}");
        }
        assert!(["a.yaml", "b.yml", "c.json"].iter().all(|n| is_manifest(OsStr::new(n))));
    }
}
